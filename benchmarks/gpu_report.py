"""One command for a machine with a GPU: build, measure, test and sanitize, and write a report.

    python -m benchmarks.gpu_report --out DIR [--minutes 8.7] [--commit NAME]

Takes under nine minutes on one GPU and needs no network. Each stage is a separate process with a
time budget, plus the time left over from earlier stages. The first stages build the kernels, run
every operator once, and measure the training step that decides. Then ``pytest -m gpu`` and
compute-sanitizer's memcheck, racecheck and initcheck run at the same time. The last stages measure
what explains the step. DIR/report.md and DIR/report.json are rewritten after every stage, and
benchmarks write rows as they come, so an interruption loses only what was not measured yet. If a
stage fails or runs out of time, the report records the end of its output, and the next stage runs.
DIR/step.json and DIR/tests.xml are the two most requested files; DIR/rest.tar.gz has all others.

The exit status is 0 only if no stage failed. A benchmark that reaches the end of its budget keeps
its rows and has not failed. ``--device cpu --quick`` tests this report: it runs with tiny shapes
and without the stages that need a GPU.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import records, staged
from benchmarks.staged import PYTHON, ROOT, Stage

SANITIZER = "compute-sanitizer"
APART = ("step.json", "tests.xml")
CHECKS = "checks"  # these stages time nothing, so they run at the same time


def stages(device: str, quick: bool, work: Path) -> list[Stage]:
    """Return the stages in order; budgets are seconds of a run of 520."""
    cuda = device.startswith("cuda")
    bench = partial(staged.bench, work, device=device, quick=quick)
    once = (PYTHON, "-m", "benchmarks.once", "--device", device)
    found = [
        Stage("operators once", once, 20),
        bench("step", "block", 120, "step"),
        tests(cuda, quick, work),
        bench("one linear", "ops", 20, "products", "one"),
        bench("all layers", "ops", 25, "model"),
        bench("decode", "block", 20, "decode"),
        bench("growth", "block", 15, "growth"),
        staged.profile(work, 20, device=device, quick=quick),
    ]
    if not cuda:
        return found
    build = Stage(
        "build", (PYTHON, "setup.py", "build_ext", "--inplace"), 90, None, None, building()
    )
    small = ("--quick",) if quick else ()
    traffic = (PYTHON, "-m", "benchmarks.traffic", "--device", device)
    traffic = (*traffic, "--json", str(work / "traffic.json"), *small)
    more = bench("one linear, 264 blocks", "ops", 10, "products")
    more.variables["RASA_EXT_SKINNY_BLOCKS"] = "264"  # two on each multiprocessor of an H100
    return [
        build,
        *found[:3],
        *sanitizers(once),
        found[3],
        more,
        *found[4:],
        Stage("traffic", traffic, 40, "traffic.json", "ncu"),
        # Last, since compiling takes long and is only a baseline.
        bench("compiled", "block", 40, "compiled"),
    ]


def tests(cuda: bool, quick: bool, work: Path) -> Stage:
    """Return the stage of all files with GPU tests; other files may need missing packages."""
    # A file that cannot be imported is an error, but the other tests still run.
    how = ("-q", "--continue-on-collection-errors", f"--junitxml={work / 'tests.xml'}")
    how += ("-m", "gpu" if cuda else "not gpu")
    if importlib.util.find_spec("xdist"):
        half = str(max(1, (os.cpu_count() or 1) // 2))
        # Distribute by test, not by file as elsewhere: a few files have most of the tests.
        how += ("-n", half, "--dist", "worksteal")
    files = ["tests/ops/test_linear.py", "-k", "test_any_strides"] if quick else gpu_test_files()
    command = (PYTHON, "-m", "pytest", *how, *files)
    return Stage("tests", command, 100, at_once=CHECKS)


def gpu_test_files() -> list[str]:
    """Return the files of tests/gpu, and those with a ``gpu`` mark or the fixture ``device``."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        takes = any(
            a.arg == "device" for each in functions if is_test(each) for a in each.args.args
        )
        if takes or "mark.gpu" in text or path.parent.name == "gpu":
            found.append(str(path.relative_to(ROOT)))
    return found


def is_test(function: ast.FunctionDef) -> bool:
    """Return whether pytest passes the function's arguments."""
    decorators = map(ast.unparse, function.decorator_list)
    return function.name.startswith("test") or any("fixture" in each for each in decorators)


def sanitizers(once: tuple[str, ...]) -> list[Stage]:
    """Return stages that run every operator under compute-sanitizer.

    Only kernels of this package are checked. initcheck may not see what unchecked kernels, such as
    cuBLAS's, have written, so it runs only operators that use no other kernels.
    """
    # Make every allocation separate: torch's cache of memory would hide errors.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def stage(tool: str, *options: str, only: tuple[str, ...] = (), variables=uncached) -> Stage:
        filtered = ("--error-exitcode=99", "--kernel-name", "kns=rasa_ext")
        command = (SANITIZER, "--tool", tool, *filtered, *options, *once, "--few", *only)
        return Stage(tool, command, 60, None, SANITIZER, variables, CHECKS)

    return [
        # torch makes API calls that may fail, and goes on if they do.
        stage("memcheck", "--report-api-errors", "no"),
        stage("racecheck", variables={}),
        stage("initcheck", only=("--weight-space",)),
    ]


def building() -> dict[str, str]:
    """Return variables that make the build fail without kernels, and build for the present card."""
    found = {"RASA_EXT_CUDA": "1"}
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and shutil.which(query[0]):
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            found["TORCH_CUDA_ARCH_LIST"] = done.stdout.split()[0]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.7, help="time limit for all stages")
    parser.add_argument("--commit", help="name of the commit, if there is no .git")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the report")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run only these stages")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.commit:
        os.environ[records.COMMIT] = given.commit
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        planned = staged.chosen(stages(given.device, given.quick, work), given.only)
        how = (given.minutes, work, given.device, given.quick, given.out.resolve(), APART)
        return staged.produce(planned, *how)


if __name__ == "__main__":
    sys.exit(main())
