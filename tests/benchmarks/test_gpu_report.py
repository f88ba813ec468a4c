"""The GPU report, run on a CPU. No test checks times."""

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

from benchmarks import block, gpu_report, linears, once, records, shapes, staged
from rasa_ext import RasaLinear, ops

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("step", "one linear", "all layers", "decode", "growth", "profile")


def test_every_stage_runs_and_leaves_its_rows(tmp_path, forked_python):
    """On a CPU, the report has the stages that need no GPU."""
    given = ("--device", "cpu", "--quick", "--out", tmp_path, "--commit", "abc1234")
    command = (forked_python, "-m", "benchmarks.gpu_report", *given)
    # Skip compilation: torch.compile on a CPU is not tested here.
    variables = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["operators once", "step", "tests", *BENCHMARKS[1:]]
    assert {stage["status"] for stage in stages.values()} == {"ok"}
    assert found["complete"]
    assert stages["tests"]["counts"]["tests"] > 0
    assert all(stages[name]["rows"] for name in BENCHMARKS)
    assert found["machine"]["commit"] == "abc1234"
    assert "the times mean nothing" in (tmp_path / "report.md").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.md", "report.json", "step.json", "tests.xml", "rest.tar.gz"}
    with tarfile.open(tmp_path / "rest.tar.gz") as archive:
        assert {"decode.json", "ours.trace.json"} < set(archive.getnames())
    rows = {row["variant"]: row for row in stages["step"]["rows"] if row.get("dropout")}
    assert {"frozen", "official", "addmm", "peft r=8", "ours"} < set(rows)
    assert rows["frozen"]["over_frozen"] == 1
    assert rows["ours"]["saved"] < rows["official"]["saved"]


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
    _peaks, *found = json.loads(path.read_text())["rows"]
    rows = {row["variant"]: row for row in found}
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


def test_the_verdict_is_of_the_first_step_and_names_what_failed():
    head = {"what": "step", "block": "llama-3.1-8b", "dtype": "bfloat16", "M": 8192, "r": 8}
    us = {"frozen": 100, "ours": 110, "ours, cublas": 121, "ours, each alone": 115, "peft r=8": 130}
    rows = [{"what": "peaks", "copy_gb_s": 3000, "gemm_tflop_s": 700, "l2_mb": 50}]
    rows += [{**head, "dropout": d, "variant": v, "us": us[v] + d} for d in (0.0, 0.5) for v in us]
    stage = {"seconds": 1.0, "budget": 1, "tail": "x", "command": "c"}
    stages = [
        {**stage, "name": "step", "status": "ok", "rows": rows},
        {**stage, "name": "tests", "status": "failed", "exit": 1},
    ]
    report = {"machine": {"device": "cuda"}, "quick": False, "complete": True, "stages": stages}
    text = staged.markdown(report)
    lines = text[text.index("## Verdict") :].splitlines()[2:6]
    assert "ours 1.100, predicted 1.1" in lines[0]
    assert "PEFT r = 8 1.300" in lines[0]
    assert "0.909" in lines[1]
    assert "0.957" in lines[2]
    assert "tests failed: x" in lines[3]
    for column in ("over_frozen", "roofline", "host_us", "graph_us", "predicted_us"):
        assert f" {column}:" in text or f" {column}," in text
    faster = [{**rows[0], "copy_gb_s": 4000}, *rows[1:]]
    slow, fast = (staged.with_predictions(each)[2]["predicted_us"] for each in (rows, faster))
    assert fast < slow
