"""The report for a machine with a GPU, run with tiny shapes on a CPU. No time is judged."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, harness, linears, once, records, shapes, staged
from rasa_ext import ops

ROOT = Path(__file__).resolve().parents[2]
OFF = "ours, each alone"
BENCHMARKS = ("step", "all layers", "decode", "one linear", "growth", "profile")


def start(python: Path, out: Path, *arguments: str) -> subprocess.Popen:
    command = (python, "-m", "benchmarks.gpu_report", "--device", "cpu", "--quick", "--out", out)
    return subprocess.Popen(
        (*command, *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def read(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def python(code: str, budget: float = 60, **more) -> staged.Stage:
    return staged.Stage("a stage", (sys.executable, "-c", code), budget, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, forked_python) -> Path:
    """The folder of one report of everything."""
    out = tmp_path_factory.mktemp("report")
    process = start(forked_python, out)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return out


def test_every_stage_runs_and_leaves_its_rows(whole):
    report = read(whole)
    assert report["complete"]
    assert [stage["name"] for stage in report["stages"]] == ["operators once", "tests", *BENCHMARKS]
    assert {stage["status"] for stage in report["stages"]} == {"ok"}
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["tests"]["counts"]["tests"] > 0
    assert by_name["tests"]["counts"]["failures"] == 0
    assert all(by_name[name]["rows"] for name in BENCHMARKS)
    assert sum(stage["budget"] for stage in report["stages"][:1]) <= 9 * 60


def test_the_matrix_holds_every_baseline_and_column(whole):
    (rows,) = (stage["rows"] for stage in read(whole)["stages"] if stage["name"] == "step")
    first = {row["variant"]: row for row in rows if row["R"] == rows[0]["R"]}
    assert {"frozen", "official", "addmm", "ours", OFF, "peft r=8", "peft r=11"} == set(first)
    assert first["frozen"]["over_frozen"] == 1
    assert first["official"]["removed"] == 0
    assert first["frozen"]["saved"] == 0
    assert first["ours"]["saved"] <= first[OFF]["saved"] < first["official"]["saved"]
    for row in rows:
        assert row["us_low"] <= row["us"] <= row["us_high"]
        assert row["roofline"] > 0
        assert row["peak"] > 0
        assert row["kernels"] is None  # not known on a CPU


def test_the_machine_is_named(whole):
    machine, text = read(whole)["machine"], (whole / "report.md").read_text()
    assert machine["torch"] == torch.__version__
    for key in ("card", "driver", "date", "host", "kernels"):
        assert key in machine
        assert f"- {key}: " in text
    assert "its times say nothing" in text
    for name in BENCHMARKS:
        assert f"## {name.capitalize()}" in text


def test_the_profile_leaves_its_files(whole):
    for name in ("frozen", "official", "ours"):
        assert "aten::mm" in (whole / f"{name}.txt").read_text()
        assert json.loads((whole / f"{name}.trace.json").read_text())["traceEvents"]
    trace = (whole / "ours.trace.json").read_text()
    assert "rasa_ext.adapted_linear_backward" in trace
    assert (whole / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_is_recorded_and_the_next_stage_goes_on(tmp_path, monkeypatch, forked_python):
    monkeypatch.setattr(staged, "PYTHON", forked_python)
    planned = [python("print('why it broke'); raise SystemExit(3)"), python("print('fine')")]
    monkeypatch.setattr(gpu_report, "stages", lambda *_: planned)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_report.main() == 1
    failed, after = read(tmp_path)["stages"]
    assert (failed["status"], failed["exit"], after["status"]) == ("failed", 3, "ok")
    assert "why it broke" in failed["tail"]
    assert "why it broke" in (tmp_path / "report.md").read_text()


def test_a_stage_out_of_time_is_killed_with_its_children(tmp_path):
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    record = staged.run(python(code), 3.0, tmp_path)
    assert record["status"] == "out of time"
    child = int(record["tail"])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_rows_of_a_benchmark_that_is_cut_are_kept(tmp_path):
    records.Results(tmp_path / "a.json", "cpu").add(us=1.5)
    record = staged.run(python("import time; time.sleep(600)", rows="a.json"), 1.0, tmp_path)
    assert (record["status"], record["rows"]) == ("cut", [{"us": 1.5}])


def test_a_program_that_is_not_there_skips_the_stage(tmp_path):
    record = staged.run(python("", needs="no-such-program"), 5.0, tmp_path)
    assert (record["status"], record["tail"]) == ("skipped", "no-such-program is not on PATH")


def test_an_interrupted_report_holds_what_ended(tmp_path, forked_python):
    process = start(forked_python, tmp_path, "--only", "operators once", "step")
    try:
        for line in iter(process.stdout.readline, b""):
            if line.startswith(b"step"):
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.communicate()
    report = read(tmp_path)
    assert not report["complete"]
    assert [stage["status"] for stage in report["stages"]] == ["ok", "interrupted"]
    assert "unfinished" in (tmp_path / "report.md").read_text()


def test_variants_that_should_be_one_function_are_checked():
    case = linears.Case(shapes.BLOCKS["tiny"], 6, 8, 1, torch.float32, "cpu")
    variants = case.variants()
    case.verify(variants)
    variants["ours"].projections["k_proj"] = variants["frozen"].projections["k_proj"]
    with pytest.raises(RuntimeError, match="ours and official differ in y of k_proj"):
        case.verify(variants)


def test_every_operator_is_called_once(monkeypatch):
    """By what runs under compute-sanitizer."""
    called = set()

    class Recorder:
        def __getattr__(self, name):
            called.add(name)
            return getattr(ops, name)

    monkeypatch.setattr(once, "ops", Recorder())
    assert once.check(once.SHAPES[0], torch.float32, "cpu") > 0
    assert called >= set(ops.OPERATORS)


def test_projections_are_fused_in_ours_alone(monkeypatch):
    """q, k, v and gate, up go together in the variant that says so, and in no other."""
    together = []
    plain = ops.linear_projections
    monkeypatch.setattr(
        ops, "linear_projections", lambda x, *a: together.append(len(a[0])) or plain(x, *a)
    )
    case = linears.Case(shapes.BLOCKS["tiny"], 6, 8, 1, torch.float32, "cpu")
    for name, module in case.variants().items():
        together.clear()
        case.step(module)()
        assert together == ([3, 2] if name == "ours" else []), name


def test_rows_as_csv_and_as_tables(tmp_path):
    kept = records.Results(tmp_path / "rows.csv", "cpu")
    kept.add(what="a", us=1.0)
    kept.add(what="b|c", gb=2.0)
    with open(tmp_path / "rows.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"what": "a", "us": "1.0", "gb": ""},
            {"what": "b|c", "us": "", "gb": "2.0"},
        ]
    assert "| b\\|c | - | 2 |" in records.table(kept.rows)
    assert records.tables(kept.rows).count("| --- |") == 2


def test_the_harness_ends_when_its_time_is_over():
    seconds = harness.interleaved({"a": lambda: time.sleep(0.01)}, 1000, at_most=0.1)
    assert 2 <= len(seconds["a"]) < 1000
