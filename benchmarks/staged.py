"""A report made of stages, each a process of its own with a time budget, written as it goes.

A stage may add to its budget what earlier ones left over. DIR/report.json and DIR/report.md are
written anew after every stage, and benchmarks write their rows as they come, so that a cut costs
only what was not measured yet. A stage that fails or runs out of time is recorded with the end of
its output, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import records

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
MEASURE = "{seconds}"


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


def bench(
    out: Path, name: str, module: str, budget: float, *arguments: str, device: str, quick: bool
) -> Stage:
    """The stage of a benchmark that takes the arguments of ``records.parser``."""
    rows = f"{name.replace(' ', '-')}.json"
    given = ("--device", device, "--json", str(out / rows), "--seconds", MEASURE)
    small = ("--quick",) if quick else ()
    command = (PYTHON, "-m", f"benchmarks.{module}", *arguments, *given, *small)
    return Stage(name, command, budget, rows)


def profile(out: Path, budget: float, *arguments: str, device: str, quick: bool) -> Stage:
    """The stage that shows where a step goes."""
    small = ("--block", "tiny", "--tokens", "40", "--steps", "2") if quick else ()
    command = (PYTHON, "-m", "benchmarks.profile", "--device", device, "--out", str(out))
    return Stage("profile", (*command, *arguments, *small), budget, "profile.json")


def chosen(planned: list[Stage], only: list[str] | None) -> list[Stage]:
    """The stages named in ``only``, or all; SystemExit where one is not known."""
    names = [stage.name for stage in planned]
    unknown = set(only or ()) - set(names)
    if unknown:
        raise SystemExit(f"--only: expected some of {names}, got {sorted(unknown)}")
    return [stage for stage in planned if stage.name in (only or names)]


def produce(planned: Sequence[Stage], minutes: float, out: Path, device: str, quick: bool) -> int:
    """Run the stages within ``minutes``, write the report, return 0 only if no stage failed."""
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then is the report written
    out.mkdir(parents=True, exist_ok=True)
    # What an earlier run left must not be taken for this one's.
    for name in ("tests.xml", *(stage.rows for stage in planned if stage.rows)):
        (out / name).unlink(missing_ok=True)
    report: dict[str, Any] = {
        "machine": machine(device),
        "quick": quick,
        "complete": False,
        "stages": [],
    }
    write(out, report)
    for index, stage in enumerate(planned):
        later = sum(each.budget for each in planned[index + 1 :])
        left = 60 * minutes - (time.monotonic() - begin)
        # All that is left but what later stages need; with too little for all, a fair part of it.
        limit = max(left - later, left * stage.budget / (stage.budget + later), 0.1)
        record = perform(stage, limit, out)
        report["stages"].append(record)
        if stage.name == "build":
            report["machine"] = machine(device)
        report["complete"] = stage is planned[-1] and record["status"] != "interrupted"
        write(out, report)
        if record["status"] == "interrupted":
            break
    print(f"wrote {out / 'report.json'} and {out / 'report.md'}")
    bad = ("failed", "out of time", "interrupted")
    return int(any(each["status"] in bad for each in report["stages"]))
