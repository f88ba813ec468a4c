"""The GPU report, run with a stand-in for the GPU and its programs. No test checks times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import block, gpu_report, linears, once, predict, records, shapes, staged, traffic
from rasa_ext import RasaLinear, ops
from tests.benchmarks import stand_in_cuda

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("step", "one linear", "all layers", "decode", "growth", "profile", "traffic")
CARD = "NVIDIA H100 80GB HBM3"
# Each script runs its arguments, starting at the Python.
SANITIZER = """#!/bin/sh
while [ "$1" != "$STAND_IN_PYTHON" ]; do shift; done
exec "$@"
"""
NCU = """#!/bin/sh
while [ "$1" != "$STAND_IN_PYTHON" ]; do [ "$1" = --log-file ] && log=$2; shift; done
cp "$STAND_IN_COUNTS" "$log"
exec "$@"
"""


def lines_of_ncu(steps: int) -> str:
    """Return ncu output: per step a mark and two kernels; the second reads 3 GiB, writes 1 GiB."""
    head = "ID,Process ID,Process Name,Host Name,Kernel Name,Context,Stream,Block Size,Grid Size,"
    head += "Device,CC,Section Name,Metric Name,Metric Unit,Metric Value"
    text = ["==PROF== Connected to process 7", ",".join(f'"{each}"' for each in head.split(","))]
    number = 0
    for _ in range(steps):
        for kernel, read, written in (
            ("at::cuda::spin_kernel(long)", 5, 5),
            ("a", 0, 0),
            ("b", 3, 1),
        ):
            for name, gib in zip(traffic.METRICS, (read, written), strict=True):
                cells = [number, 7, "python", "host", kernel, 1, 7, "(1, 1, 1)", "(1, 1, 1)", 0]
                cells += [9.0, "Command line profiler metrics", name, "byte", f"{gib * 2**30:,}"]
                text.append(",".join(f'"{each}"' for each in cells))
            number += 1
    return "\n".join(text) + "\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory, forked_python):
    """A function that runs a report of tiny shapes, and returns exit status, folder and content."""
    python = stand_in_cuda.program(forked_python, tmp_path_factory.mktemp("program"))

    def run(*arguments: str, **variables: str) -> tuple[int, Path, dict]:
        out = tmp_path_factory.mktemp("report")
        command = (python, "-m", "benchmarks.gpu_report", "--quick", "--out", out, *arguments)
        # Skip compilation: torch.compile on a CPU is not tested here.
        variables = {**os.environ, "TORCHDYNAMO_DISABLE": "1", **variables}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        print(done.stdout, done.stderr)  # shown if a test fails
        return done.returncode, out, json.loads((out / "report.json").read_text())

    return run


def test_every_stage_runs_and_leaves_its_rows(report, tmp_path):
    for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    counts = tmp_path / "counts.csv"
    counts.write_text(lines_of_ncu(len(traffic.STEPS)))
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STAND_IN_COUNTS": str(counts)}
    variables |= {stand_in_cuda.KERNELS: "1"}
    code, out, found = report("--commit", "abc1234", **variables)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert {stage["status"] for stage in stages.values()} == {"ok"}
    assert code == 0
    assert found["complete"]
    checks = ["tests", "memcheck", "racecheck", "initcheck"]
    first = ["build", "operators once", "step", *checks]
    assert list(stages) == [*first, *BENCHMARKS[1:], "compiled"]
    assert stages["tests"]["counts"]["tests"] > 0
    assert all(stages[name]["rows"] for name in BENCHMARKS)
    assert found["machine"]["commit"] == "abc1234"
    assert found["machine"]["card"].startswith("NVIDIA Stand-in")
    assert "the times mean nothing" in (out / "report.md").read_text()
    names = {path.name for path in out.iterdir()}
    assert names == {"report.md", "report.json", "step.json", "tests.xml", "rest.tar.gz"}
    with tarfile.open(out / "rest.tar.gz") as archive:
        assert {"memcheck.log", "decode.json", "ours.trace.json"} < set(archive.getnames())
    rows = {row["variant"]: row for row in stages["step"]["rows"] if row["dropout"]}
    assert {"frozen", "official", "addmm", "peft r=8", "ours", "ours, cublas"} < set(rows)
    assert rows["frozen"]["over_frozen"] == rows["frozen"]["graph_over_frozen"] == 1
    assert rows["official"]["removed"] == 0
    assert rows["ours"]["saved"] < rows["official"]["saved"]
    for row in stages["traffic"]["rows"]:
        assert (row["read_gib"], row["written_gib"], row["gib"], row["kernels"]) == (3, 1, 4, 2)


def test_what_pytorch_computed_is_not_reported_as_a_kernel_s(report):
    code, out, found = report("--only", "build", "operators once", "step")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert code == 1
    assert "CUDA kernels cannot be built" in stages["build"]["tail"]
    assert "no kernels to check: 0 of" in stages["operators once"]["tail"]
    names = {row["variant"] for row in stages["step"]["rows"]}
    assert "ours (PyTorch)" in names
    assert "ours" not in names
    assert "no kernels to check" in (out / "report.md").read_text()


def test_the_plan_takes_nine_minutes_and_what_decides_comes_first(tmp_path):
    planned = gpu_report.stages("cuda", False, tmp_path)
    assert [stage.name for stage in planned][:3] == ["build", "operators once", "step"]
    budgets = [max(stage.budget for stage in group) for group in staged.groups(planned)]
    assert sum(budgets) <= 60 * 8.7


def run(code: str, tmp_path: Path, rows: str | None = None) -> dict:
    stage = staged.Stage("a stage", (sys.executable, "-c", code), 60, rows)
    (record,) = staged.run([stage], 60.0, tmp_path)
    return record


def test_a_stage_out_of_time_is_killed_with_its_children(tmp_path, monkeypatch):
    log = tmp_path / "a-stage.log"

    def now() -> float:  # the clock jumps once the child runs
        return time.monotonic() + 1000 * (log.exists() and "\n" in log.read_text())

    monkeypatch.setattr(staged, "GRACE", 0.1)
    monkeypatch.setattr(staged, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    record = run(code, tmp_path)
    assert record["status"] == "out of time"
    state = Path(f"/proc/{record['tail'].strip()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def test_rows_of_a_benchmark_that_is_killed_are_kept(tmp_path):
    records.Results(tmp_path / "a.json", "cpu").add(us=1.5)
    record = run("import os; os.kill(os.getpid(), 9)", tmp_path, "a.json")
    assert (record["status"], record["rows"]) == ("failed", [{"us": 1.5}])
    assert staged.said(record) == "ended by signal 9, 1 rows"


def test_ours_that_is_wrong_is_not_timed_and_the_others_are(monkeypatch, tmp_path):
    path = tmp_path / "step.json"
    given = ["step", "--quick", "--device", "cpu", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["block", *given])
    monkeypatch.setattr(block, "cases", lambda *_: [("step", shapes.BLOCKS["tiny"], 6, 8, 1, 0.0)])
    monkeypatch.setattr(RasaLinear, "forward", lambda self, x: self.base_layer(x))
    with pytest.raises(SystemExit) as end:
        block.main()
    assert end.value.code == 1
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    for name in ("ours", "ours, fused"):
        assert rows.pop(name)["failed"].startswith("differs from official in y of")
    assert {"frozen", "official", "addmm", "peft r=8"} < set(rows)
    assert all(row["us"] > 0 for row in rows.values())


def test_every_operator_is_called_once(monkeypatch):
    """The program that runs under compute-sanitizer calls every operator."""
    called = set()

    class Recorder:
        def __getattr__(self, name):
            called.add(name)
            return getattr(ops, name)

    monkeypatch.setattr(once, "ops", Recorder())
    assert once.check(once.SHAPES[0], torch.float32, "cpu") > 0
    assert called >= set(ops.OPERATORS)


def test_projections_are_fused_in_ours_alone(monkeypatch):
    """Only the variant "ours, fused" fuses q, k, v and gate, up."""
    together = []
    plain = ops.linear_projections
    monkeypatch.setattr(
        ops, "linear_projections", lambda x, *a: together.append(len(a[0])) or plain(x, *a)
    )
    case = linears.Case(shapes.BLOCKS["tiny"], 64, 8, 1, torch.float32, "cpu")
    for name, module in case.variants().items():
        together.clear()
        case.step(module)()
        assert together == ([3, 2] if name == "ours, fused" else []), name


def test_a_step_has_what_was_predicted_beside_it():
    row = {"what": "step", "block": "llama-3.1-8b", "M": 8192, "r": 8, "R": 39, "variant": "ours"}
    found = staged.with_prediction(row, CARD)
    fused = predict.step("llama-3.1-8b", 8192, 8, "H100", "ours fused")
    assert found["predicted_us"] == pytest.approx(1e3 * fused.ms)
    for other in ({**row, "variant": "ours (PyTorch)"}, {**row, "what": "decode"}):
        assert staged.with_prediction(other, CARD) == other
