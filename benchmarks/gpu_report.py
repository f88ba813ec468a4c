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
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import records

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
MEASURE = "{seconds}"
SANITIZER = ("compute-sanitizer", "--error-exitcode=99", "--tool")


@dataclass(frozen=True)
class Stage:
    """A process: what it runs, seconds that are its own, and the file that holds its rows.

    MEASURE in the command stands for the seconds in which it may begin new measurements.
    """

    name: str
    command: tuple[str, ...]
    budget: float
    rows: str | None = None
    needs: str | None = None  # a program; the stage is skipped where there is none
    variables: dict[str, str] = field(default_factory=dict)

    def skipped(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs is None or shutil.which(self.needs):
            return None
        return f"{self.needs} is not on PATH"


def stages(device: str, quick: bool, out: Path) -> list[Stage]:
    """What there is to do, in order; budgets are seconds out of a run of 520."""
    cuda = device.startswith("cuda")
    once = (PYTHON, "-m", "benchmarks.once", "--device", device)
    if quick:
        tests = ("tests/test_ops.py", "-k", "test_strides and cpu")
    else:
        tests = ("-m", "gpu" if cuda else "not gpu")
    junit = f"--junitxml={out / 'tests.xml'}"

    def bench(name: str, module: str, budget: float, *arguments: str) -> Stage:
        rows = f"{name.replace(' ', '-')}.json"
        given = ("--device", device, "--json", str(out / rows), "--seconds", MEASURE)
        small = ("--quick",) if quick else ()
        command = (PYTHON, "-m", f"benchmarks.{module}", *arguments, *given, *small)
        return Stage(name, command, budget, rows)

    profile = (PYTHON, "-m", "benchmarks.profile", "--device", device, "--out", str(out))
    small = ("--block", "tiny", "--tokens", "40", "--steps", "2") if quick else ()
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
        Stage("profile", (*profile, *small), 20, "profile.json"),
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


def run(stage: Stage, limit: float, out: Path) -> dict[str, Any]:
    """Status, seconds, the end of the output, and the rows that the stage left."""
    record: dict[str, Any] = {"name": stage.name, "budget": limit, "status": "skipped"}
    # Importing torch and finishing what is in hand take time of their own.
    measure = f"{max(limit - 15, 0.3 * limit):.1f}"
    command = [measure if argument == MEASURE else argument for argument in stage.command]
    record["command"] = " ".join(command)
    if (why := stage.skipped()) is not None:
        return {**record, "seconds": 0.0, "tail": why}
    log = out / f"{stage.name.replace(' ', '-')}.log"
    begin = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            record["status"] = "ok" if code == 0 else "failed"
            record["exit"] = code
        except subprocess.TimeoutExpired:
            record["status"] = "out of time"
        except KeyboardInterrupt:
            record["status"] = "interrupted"
        finally:
            # Its children as well: a compiler's, a sanitizer's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record["seconds"] = time.monotonic() - begin
    record["tail"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    if stage.rows and (out / stage.rows).exists():
        record["rows"] = json.loads((out / stage.rows).read_text(encoding="utf-8"))["rows"]
        # Benchmarks are cut where their budget ends; what they have measured stands.
        if record["status"] == "out of time" and record["rows"]:
            record["status"] = "cut"
    if stage.name == "tests":
        record["counts"] = counts(out / "tests.xml")
    return record


def counts(path: Path) -> dict[str, int] | None:
    """How many tests ran, failed and were skipped; None where pytest did not come to its end."""
    if not path.exists():
        return None
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    kinds = ("tests", "failures", "errors", "skipped")
    return {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds}


def machine(device: str) -> dict[str, Any]:
    """Card, driver and versions, asked of a process that sees what the build has made."""
    command = (PYTHON, "-m", "benchmarks.records", device)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"device": device, "failed": done.stderr[-1000:]}


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files of the report as it stands."""
    records.write_json(out / "report.json", report)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    head = report["machine"]
    lines = [f"# rasa_ext on {head.get('card') or head.get('host') or head['device']}", ""]
    if report["quick"]:
        lines += ["Tiny shapes, a test of the report itself: its times say nothing.", ""]
    lines += [f"- {name}: {records.shown(value)}" for name, value in head.items()]
    shown = [
        {
            "stage": each["name"],
            "status": each["status"],
            "seconds": round(each["seconds"], 1),
            "budget": round(each["budget"]),
            "found": found(each),
        }
        for each in report["stages"]
    ]
    state = "complete" if report["complete"] else "unfinished: stages below are those that ended"
    lines += ["", f"## Stages ({state})", "", records.table(shown)]
    for each in report["stages"]:
        if each.get("rows"):
            lines += ["", f"## {each['name'].capitalize()}", "", records.tables(each["rows"])]
    for each in report["stages"]:
        if each["status"] in ("failed", "out of time", "cut", "interrupted"):
            lines += ["", f"## Output of {each['name']}", "", f"    {each['command']}", ""]
            lines += ["```", each["tail"].replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def found(stage: dict[str, Any]) -> str:
    """A stage's outcome in a few words."""
    if stage.get("counts"):
        return ", ".join(f"{number} {kind}" for kind, number in stage["counts"].items())
    if "rows" in stage:
        return f"{len(stage['rows'])} rows"
    lines = stage["tail"].strip().splitlines()
    return lines[-1][:160] if lines else ""


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
    given.stages = stages(given.device, given.quick, given.out)
    names = [stage.name for stage in given.stages]
    unknown = set(given.only or ()) - set(names)
    if unknown:
        parser.error(f"--only: expected some of {names}, got {sorted(unknown)}")
    given.stages = [stage for stage in given.stages if stage.name in (given.only or names)]
    return given


def perform(stage: Stage, limit: float, out: Path) -> dict[str, Any]:
    """``run``, also where it is interrupted before the stage's process began."""
    try:
        print(f"{stage.name}: up to {limit:.0f} s", flush=True)
        record = run(stage, limit, out)
    except KeyboardInterrupt:
        record = {"name": stage.name, "status": "interrupted", "budget": limit}
        record |= {"command": " ".join(stage.command), "seconds": 0.0, "tail": ""}
    print(f"  {record['status']} after {record['seconds']:.0f} s: {found(record)}", flush=True)
    return record


def main() -> int:
    begin = time.monotonic()
    given = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then is the report written
    out, planned = given.out, given.stages
    out.mkdir(parents=True, exist_ok=True)
    # What an earlier run left must not be taken for this one's.
    for name in ("tests.xml", *(stage.rows for stage in planned if stage.rows)):
        (out / name).unlink(missing_ok=True)
    report: dict[str, Any] = {
        "machine": machine(given.device),
        "quick": given.quick,
        "complete": False,
        "stages": [],
    }
    write(out, report)
    for index, stage in enumerate(planned):
        later = sum(each.budget for each in planned[index + 1 :])
        left = 60 * given.minutes - (time.monotonic() - begin)
        # All that is left but what later stages need; with too little for all, a fair part of it.
        limit = max(left - later, left * stage.budget / (stage.budget + later), 0.1)
        record = perform(stage, limit, out)
        report["stages"].append(record)
        if stage.name == "build":
            report["machine"] = machine(given.device)
        report["complete"] = stage is planned[-1] and record["status"] != "interrupted"
        write(out, report)
        if record["status"] == "interrupted":
            break
    print(f"wrote {out / 'report.json'} and {out / 'report.md'}")
    bad = ("failed", "out of time", "interrupted")
    return int(any(each["status"] in bad for each in report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
