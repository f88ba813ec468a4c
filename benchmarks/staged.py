"""A report made of stages, each a separate process with a time budget, written after every stage.

A stage may also use the time left over from earlier stages. report.json and report.md are rewritten
after every stage, and benchmarks write rows as they come, so an interruption loses only what was
not measured yet. If a stage fails or runs out of time, the report records the end of its output,
and the next stage runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import block, predict, records

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
MEASURE = "{seconds}"
GRACE = 5  # seconds between asking a process to end and killing it
OPTIONAL = ("peft", "transformers", "accelerate")  # packages that a machine may lack
BAD = ("failed", "out of time", "interrupted")


@dataclass(frozen=True)
class Stage:
    """A process: the command, its budget in seconds, and the file with its rows.

    MEASURE in the command stands for the seconds in which the process may start new measurements.
    """

    name: str
    command: tuple[str, ...]
    budget: float
    rows: str | None = None
    needs: str | None = None  # a program; the stage is skipped if it is not on PATH
    variables: dict[str, str] = field(default_factory=dict)
    at_once: str | None = None  # neighbours with an equal value run at the same time


def run(stages: Sequence[Stage], limit: float, work: Path) -> list[dict[str, Any]]:
    """Run stages at the same time; return status, seconds, end of output and rows of each."""
    found = [blank(stage, limit) for stage in stages]
    running: dict[int, subprocess.Popen[bytes]] = {}
    begin = time.monotonic()
    try:
        for index, stage in enumerate(stages):
            print(f"{stage.name}: up to {limit:.0f} s", flush=True)
            if stage.needs and not shutil.which(stage.needs):
                found[index] |= {"status": "skipped", "tail": f"{stage.needs} is not on PATH"}
            else:
                running[index] = start(stage, limit, work)
        while running:
            seconds = time.monotonic() - begin
            for index, process in list(running.items()):
                if process.poll() is None and seconds < limit:
                    continue
                late = end(running.pop(index))
                code = process.returncode
                found[index] |= {"exit": code, "seconds": time.monotonic() - begin}
                found[index]["status"] = "out of time" if late else "failed" if code else "ok"
            time.sleep(0.02)
    except KeyboardInterrupt:
        for index in running:
            found[index]["seconds"] = time.monotonic() - begin
    finally:
        for process in running.values():
            end(process)
    for stage, record in zip(stages, found, strict=True):
        if record["status"] != "skipped":
            read(stage, record, work)
        print(f"  {record['status']} after {record['seconds']:.0f} s: {said(record)}", flush=True)
    return found


def blank(stage: Stage, limit: float) -> dict[str, Any]:
    """Return the record of a stage that has not ended."""
    state = {"status": "interrupted", "seconds": 0.0, "tail": ""}
    command = " ".join(
        "python" if argument == PYTHON else argument for argument in command_of(stage, limit)
    )
    return {"name": stage.name, "budget": limit, "command": command, **state}


def command_of(stage: Stage, limit: float) -> list[str]:
    # Importing torch and finishing the current measurement take extra time.
    measure = f"{max(limit - 15, 0.3 * limit):.1f}"
    return [measure if argument == MEASURE else argument for argument in stage.command]


def log_of(stage: Stage, work: Path) -> Path:
    return work / f"{stage.name.replace(' ', '-')}.log"


def start(stage: Stage, limit: float, work: Path) -> subprocess.Popen[bytes]:
    # A shell makes background processes ignore SIGINT, and a stage would inherit that, but SIGINT
    # is what ends stages. (Not by preexec_fn: an interrupt while Python forks for it is lost.)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    variables = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **stage.variables}
    with open(log_of(stage, work), "w", encoding="utf-8") as file:
        return subprocess.Popen(
            command_of(stage, limit),
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> bool:
    """End a process and its children, such as a compiler's; return whether it was still running."""
    late = process.poll() is None
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if late:
            os.killpg(process.pid, signal.SIGINT)  # on which pytest still writes its results
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return late


def read(stage: Stage, record: dict[str, Any], work: Path) -> None:
    """Add to a stage's record what the stage left: the end of its output, rows, counts of tests."""
    log = log_of(stage, work)
    if log.exists():
        record["tail"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    if stage.rows:
        path = work / stage.rows
        record["rows"] = json.loads(path.read_text())["rows"] if path.exists() else []
        # A benchmark is cut at the end of its budget, but its rows are valid.
        if record["status"] == "out of time" and record["rows"]:
            record["status"] = "cut"
        if record["status"] == "ok" and not record["rows"]:
            record["status"] = "failed"
    if stage.name == "tests":
        found = record["counts"] = counts(work / "tests.xml")
        left_out = found and found["tests"] and not (found["failures"] or found["errors"])
        if left_out and record.get("exit") == 1:  # as pytest ends after errors of collection
            record["status"] = "ok"


def counts(path: Path) -> dict[str, int] | None:
    """Return how many tests ran, failed and were skipped; None if pytest did not finish.

    A file that needs one of OPTIONAL, which is not installed, is counted apart from errors.
    """
    if not path.exists():
        return None
    root = ElementTree.parse(path).getroot()
    kinds = ("tests", "failures", "errors", "skipped")
    found = {kind: sum(int(s.get(kind, 0)) for s in root.iter("testsuite")) for kind in kinds}
    for error in root.iter("error"):
        if missing := re.search(rf"No module named '({'|'.join(OPTIONAL)})", error.text or ""):
            kind = f"files without {missing[1]}"
            found |= {"errors": found["errors"] - 1, kind: found.get(kind, 0) + 1}
    return found


def machine(device: str) -> dict[str, Any]:
    """Return card, driver and versions, from a new process that sees the finished build."""
    command = (PYTHON, "-m", "benchmarks.records", device)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"device": device, "failed": done.stderr[-1000:]}


def markdown(report: dict[str, Any]) -> str:
    """Format the report as markdown."""
    head = report["machine"]
    lines = [f"# rasa_ext on {head.get('card') or head.get('host') or head['device']}", ""]
    if report["quick"]:
        lines += ["Tiny shapes, to test the report: the times mean nothing.", ""]
    lines += [f"- {name}: {records.shown(value)}" for name, value in head.items()]
    shown = [
        {
            "stage": each["name"],
            "status": each["status"],
            "seconds": round(each["seconds"], 1),
            "budget": round(each["budget"]),
            "found": said(each),
        }
        for each in report["stages"]
    ]
    state = "complete" if report["complete"] else "unfinished: only these stages ended"
    lines += ["", "## Verdict", "", *verdict(report["stages"])]
    lines += ["", f"## Stages ({state})", "", records.table(shown)]
    for each in report["stages"]:
        if each.get("rows"):
            rows = with_predictions(each["rows"])
            lines += ["", f"## {each['name'].capitalize()}", "", records.tables(rows)]
    for each in report["stages"]:
        if each["status"] in (*BAD, "cut"):
            lines += ["", f"## Output of {each['name']}", "", f"    {each['command']}", ""]
            lines += ["```", each["tail"].replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def verdict(stages: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines that decide: the first step's ratios, and what failed."""
    rows = [r for each in stages for r in with_predictions(each.get("rows", ())) if is_step(r)]
    first = [row for row in rows if all(row[key] == rows[0][key] for key in _CASE)]
    us = {row["variant"]: row["us"] for row in first if "us" in row}
    predicted = {row["variant"]: row.get("predicted_over_frozen") for row in first}
    failed = {row["variant"]: row["failed"] for row in first if "failed" in row}

    def over(variant: str, other: str) -> str:
        if {variant, other} <= us.keys():
            return f"{us[variant] / us[other]:.3f}"
        why = failed.get(variant) or failed.get(other)
        return f"not measured ({why})" if why else "not measured"

    ratio = predicted.get("ours")
    expected = f"predicted {ratio:.3f}" if ratio else f"not predicted: {_PREDICTED}"
    case = ", ".join(f"{key} {rows[0][key]}" for key in _CASE) if rows else "no step was measured"
    bad = [f"{each['name']} {each['status']}: {said(each)}" for each in stages if is_bad(each)]
    return [
        f"- Step over frozen ({case}): ours {over('ours', 'frozen')}, {expected}; "
        f"PEFT r = 8 {over('peft r=8', 'frozen')}.",
        f"- The kernels over cuBLAS: {over('ours', 'ours, cublas')}; below 1 they stay.",
        f"- Fused projections over separate ones: {over('ours', 'ours, each alone')}.",
        f"- Failed: {'; '.join(bad) or 'nothing'}.",
        "",
        *str(block.__doc__).partition("Columns:\n\n")[2].partition("\n\n``ours")[0].splitlines(),
        "- predicted_us, predicted_over_frozen: benchmarks.predict, by the measured peaks.",
    ]


_PREDICTED = f"benchmarks.predict has {' and '.join(predict.MODELS)}, at r = 8"
_CASE = ("block", "dtype", "M", "r", "dropout")


def is_step(row: dict[str, Any]) -> bool:
    return row.get("what") == "step" and "variant" in row


def is_bad(stage: dict[str, Any]) -> bool:
    counts = stage.get("counts") or {}
    return stage["status"] in BAD or bool(counts.get("failures") or counts.get("errors"))


def with_predictions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add predicted times to steps for which there is a prediction, from the peaks in ``rows``."""
    card = next((predict.card_of(row) for row in rows if row.get("what") == "peaks"), None)
    return [row if card is None else with_prediction(row, card) for row in rows]


def with_prediction(row: dict[str, Any], card: predict.Card) -> dict[str, Any]:
    """Add predicted times to a step's row, if there is a prediction for it."""
    names = {name.format(R=row.get("R")): its for name, its in predict.CHECKED.items()}
    names["ours, cublas"] = "ours fused cublas"
    variant = names.get(row.get("variant", ""))
    if variant is None or row.get("what") != "step":
        return row
    if row["block"] not in predict.MODELS or row["r"] != 8:
        return row
    of = (row["block"], row["M"], row["r"], card)
    dropout = row.get("dropout", 0.0)
    found, frozen = (predict.step(*of, name, dropout).ms for name in (variant, "frozen"))
    return {**row, "predicted_us": 1e3 * found, "predicted_over_frozen": found / frozen}


def said(stage: dict[str, Any]) -> str:
    """Describe a stage's outcome in a few words."""
    lines = stage["tail"].strip().splitlines()
    last = lines[-1][:160] if lines else ""
    found = []
    if stage["status"] == "failed" and stage["exit"] < 0:
        found.append(f"ended by signal {-stage['exit']}")
    if stage.get("counts"):
        found += [f"{number} {kind}" for kind, number in stage["counts"].items()]
    if "rows" in stage:
        found.append(f"{len(stage['rows'])} rows")
    if stage["status"] not in ("ok", "cut") or not found:
        found.append(last)
    return ", ".join(filter(None, found))


def bench(
    work: Path,
    name: str,
    module: str,
    budget: float,
    *arguments: str,
    device: str | None,
    quick: bool,
) -> Stage:
    """Return the stage of a benchmark that takes the arguments of ``records.parser``.

    Without a ``device``, it may also be one that takes only the time limit and the file.
    """
    rows = f"{name.replace(' ', '-')}.json"
    given = ("--json", str(work / rows), "--seconds", MEASURE)
    on = ("--device", device) if device else ()
    small = ("--quick",) if quick else ()
    command = (PYTHON, "-m", f"benchmarks.{module}", *arguments, *on, *given, *small)
    return Stage(name, command, budget, rows)


def profile(work: Path, budget: float, *arguments: str, device: str, quick: bool) -> Stage:
    """Return the stage that shows where the time of a step goes."""
    small = ("--block", "tiny", "--tokens", "64", "--steps", "2") if quick else ()
    command = (PYTHON, "-m", "benchmarks.profile", "--device", device, "--out", str(work))
    return Stage("profile", (*command, *arguments, *small), budget, "profile.json")


def chosen(planned: list[Stage], only: list[str] | None) -> list[Stage]:
    """Return the stages named in ``only``, or all; raise SystemExit if a name is unknown."""
    names = [stage.name for stage in planned]
    unknown = set(only or ()) - set(names)
    if unknown:
        raise SystemExit(f"--only: expected some of {names}, got {sorted(unknown)}")
    return [stage for stage in planned if stage.name in (only or names)]


def groups(planned: Sequence[Stage]) -> list[list[Stage]]:
    """Group neighbouring stages that run at the same time."""
    return [list(each) for _, each in itertools.groupby(planned, lambda s: s.at_once or id(s))]


def produce(
    planned: Sequence[Stage],
    minutes: float,
    work: Path,
    device: str,
    quick: bool,
    out: Path | None = None,
    apart: Sequence[str] = (),
) -> int:
    """Run the stages within ``minutes``, write the report, return 0 only if no stage failed.

    Stages write their files to ``work``. If ``out`` is given, the report goes there, with the files
    named in ``apart`` and one archive of all others.
    """
    begin = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):  # both still write the report
        signal.signal(number, signal.default_int_handler)
    report: dict[str, Any] = {
        "machine": machine(device),
        "quick": quick,
        "complete": False,
        "stages": [],
    }
    write(report, work, out, apart)
    todo = groups(planned)
    for index, group in enumerate(todo):
        budget = max(stage.budget for stage in group)
        later = sum(max(stage.budget for stage in each) for each in todo[index + 1 :])
        left = 60 * minutes - (time.monotonic() - begin)
        # All remaining time except what later stages need, or a proportional part if that is too
        # little.
        limit = max(left - later, left * budget / (budget + later), 0.1)
        found = run(group, limit, work)
        report["stages"] += found
        if group[0].name == "build":
            report["machine"] = machine(device)
        interrupted = any(each["status"] == "interrupted" for each in found)
        report["complete"] = group is todo[-1] and not interrupted
        write(report, work, out, apart)
        if interrupted:
            break
    print(f"wrote {(out or work) / 'report.json'} and report.md in that folder")
    return int(any(each["status"] in BAD for each in report["stages"]))


def write(report: dict[str, Any], work: Path, out: Path | None, apart: Sequence[str]) -> None:
    """Write the current report, and the files that the stages left."""
    where = out or work
    where.mkdir(parents=True, exist_ok=True)
    records.write_json(where / "report.json", report)
    (where / "report.md").write_text(markdown(report), encoding="utf-8")
    if out is None:
        return
    for name in apart:
        if (work / name).exists():
            shutil.copy(work / name, out / name)
    with tarfile.open(out / "rest.tar.gz", "w:gz", compresslevel=6) as archive:
        for path in sorted(work.iterdir()):
            if path.name not in apart:
                archive.add(path, path.name)
