"""The GPU report, run on a CPU. No test checks times."""

import dataclasses
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import block, gpu_report, records, shapes, staged
from rasa_ext import RasaLinear
from tests.helpers.processes import run_whole

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("step", "one linear", "all layers", "decode", "growth", "profile")


def test_every_stage_runs_and_leaves_its_rows(tmp_path, forked_python):
    """On a CPU, the report has the stages that need no GPU."""
    given = ("--device", "cpu", "--quick", "--out", tmp_path, "--commit", "abc1234")
    command = (forked_python, "-m", "benchmarks.gpu_report", *given)
    # Skip compilation: torch.compile on a CPU is not tested here.
    variables = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    run_whole(command, cwd=ROOT, env=variables)
    found = json.loads((tmp_path / "report.json").read_text())
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["operators once", "step", "tests", *BENCHMARKS[1:]]
    assert {stage["status"] for stage in stages.values()} == {"ok"}
    assert found["complete"]
    assert stages["tests"]["counts"]["tests"] > 0
    assert all(stages[name]["rows"] for name in BENCHMARKS)
    assert found["machine"]["commit"] == "abc1234"
    assert "the times mean nothing" in (tmp_path / "report.md").read_text()
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
    verdict = staged.markdown(report).partition("## Verdict")[2]
    for said in ("ours 1.100, predicted 1.1", "PEFT r = 8 1.300", "0.909", "0.957"):
        assert said in verdict
    assert "tests failed: x" in verdict


def test_the_verdict_says_why_a_ratio_is_missing():
    head = {"what": "step", "block": "tiny", "dtype": "bfloat16", "M": 64, "r": 8, "dropout": 0.0}
    rows = [{**head, "variant": name, "us": 100.0} for name in ("frozen", "ours")]
    rows += [{**head, "variant": "peft r=8", "failed": "No module named 'peft'"}]
    first, *_ = staged.verdict([{"name": "step", "status": "ok", "rows": rows}])
    assert "not predicted" in first
    assert "PEFT r = 8 not measured (No module named 'peft')" in first


@pytest.mark.parametrize(("module", "status"), [("peft", "ok"), ("rasa_ext.x", "failed")])
def test_only_a_missing_package_is_no_failure(module, status, tmp_path, monkeypatch):
    """pytest itself ends with an error if a file cannot be imported."""
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\")")
    (tmp_path / "test_a.py").write_text(f"import {module}\n")
    (tmp_path / "test_b.py").write_text("def test_b():\n    pass\n")
    monkeypatch.setattr(gpu_report, "gpu_test_files", lambda: [str(tmp_path)])
    stage = gpu_report.tests(cuda=False, quick=False, work=tmp_path)
    stage = dataclasses.replace(stage, variables={"PYTHONPATH": str(tmp_path)})
    (record,) = staged.run([stage], 60.0, tmp_path)
    assert record["status"] == status, record["tail"]
    assert record["counts"]["errors"] == (status == "failed")
    assert ("1 files without peft" in staged.said(record)) == (status == "ok")
