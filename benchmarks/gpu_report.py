"""One command for a machine with a GPU: build, test, sanitize, measure, and write it all down.

    python -m benchmarks.gpu_report --out DIR [--minutes 8.7]

Under nine minutes on one GPU and no network. Stages, each a process of its own with a time budget
to which it may add what earlier ones left over: build the kernels, run ``pytest -m gpu``,
compute-sanitizer's memcheck and racecheck over every operator, then the benchmarks, the most
telling first. DIR/report.json and DIR/report.md are written anew after every stage, and benchmarks
write their rows as they come, so that a cut costs only what was not measured yet. A stage that
fails or runs out of time is recorded with the end of its output, and the next one goes on.

The exit status is 0 only if no stage failed. A benchmark that its budget ends keeps what it has
measured and has not failed. ``--device cpu --quick`` is the same path with tiny shapes and no
build: a test of this report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks import staged
from benchmarks.staged import PYTHON, Stage

SANITIZER = ("compute-sanitizer", "--error-exitcode=99", "--tool")


def stages(device: str, quick: bool, out: Path) -> list[Stage]:
    """What there is to do, in order; budgets are seconds out of a run of 520."""
    cuda = device.startswith("cuda")
    once = (PYTHON, "-m", "benchmarks.once", "--device", device)
    if quick:
        tests = ("tests/ops/test_linear.py", "-k", "test_any_strides and cpu")
    else:
        tests = ("-m", "gpu" if cuda else "not gpu")
    junit = f"--junitxml={out / 'tests.xml'}"
    bench = partial(staged.bench, out, device=device, quick=quick)
    pytest = Stage("tests", (PYTHON, "-m", "pytest", "-q", *tests, junit), 100)
    found = [Stage("operators once", once, 20), pytest]
    if cuda:
        # Every error of an allocation of its own, which torch's cache of memory would hide.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        build = (PYTHON, "setup.py", "build_ext", "--inplace")
        memcheck = (*SANITIZER, "memcheck", *once, "--few")
        # Of the kernels written here alone: cuBLAS's would take all the time.
        racecheck = (*SANITIZER, "racecheck", "--kernel-regex", "kns=rasa_ext", *once, "--few")
        found = [
            Stage("build", build, 100, variables=build_variables()),
            *found,
            Stage("memcheck", memcheck, 30, None, SANITIZER[0], uncached),
            Stage("racecheck", racecheck, 30, None, SANITIZER[0]),
        ]
    return [
        *found,
        bench("step", "block", 75, "step"),
        bench("all layers", "ops", 25, "model"),
        bench("decode", "block", 25, "decode"),
        bench("one linear", "ops", 20, "one"),
        bench("growth", "block", 20, "growth"),
        staged.profile(out, 20, device=device, quick=quick),
        # Compiling takes long and is a baseline only, so that it comes last.
        *([bench("compiled", "block", 40, "compiled")] if cuda else []),
    ]


def build_variables() -> dict[str, str]:
    """Kernels or a failure, for the card that is here unless told otherwise."""
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
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything together")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test of the report")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="leave all others out")
    given = parser.parse_args()
    given.out = given.out.resolve()
    return given


def main() -> int:
    given = arguments()
    planned = staged.chosen(stages(given.device, given.quick, given.out), given.only)
    return staged.produce(planned, given.minutes, given.out, given.device, given.quick)


if __name__ == "__main__":
    sys.exit(main())
