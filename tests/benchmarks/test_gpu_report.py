"""The plan of the GPU report, and the results of a failed or stopped one; no times checked."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import block, gpu_report, harness, linears, once, predict, records, shapes, staged
from rasa_ext import RasaLinear, ops

ROOT = Path(__file__).resolve().parents[2]
# Installed for the tests, but absent where the report runs.
ABSENT = ("bitsandbytes", "torchao", "datasets", "trl", "gguf")
COLLECT = """
import importlib.machinery, sys
import pytest, torch
absent, torch.cuda.is_available = {absent}, lambda: True
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = (
    lambda name, *of, **how: None if name.partition(".")[0] in absent else find(name, *of, **how)
)
for name in absent:
    assert name not in sys.modules
how = ["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
class Names:
    def pytest_collection_finish(self, session):
        print("\\n".join("gpu: " + item.nodeid for item in session.items))
sys.exit(pytest.main([*how, *{files}], plugins=[Names()]))
"""


def read(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def python(code: str, budget: float = 60, **more) -> staged.Stage:
    return staged.Stage("a stage", (sys.executable, "-c", code), budget, **more)


def run(stage: staged.Stage, limit: float, work: Path) -> dict:
    (record,) = staged.run([stage], limit, work)
    return record


def collected(python: Path | str, files: list[str], absent: tuple[str, ...]) -> set[str]:
    """Return the tests marked gpu in the files, collected with the ``absent`` packages hidden."""
    code = COLLECT.format(absent=absent, files=files)
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return {line for line in lines if line.startswith("gpu: ")}


def test_every_gpu_test_is_collected_where_little_is_installed(forked_python):
    found = collected(sys.executable, gpu_report.gpu_test_files(), ABSENT)
    assert found == collected(forked_python, ["tests"], ())
    assert found


def test_the_plan_takes_nine_minutes_and_what_decides_comes_first(tmp_path):
    planned = gpu_report.stages("cuda", False, tmp_path)
    names = [stage.name for stage in planned]
    assert names[:3] == ["build", "operators once", "step"]
    assert names[-1] == "compiled"
    groups = staged.groups(planned)
    assert ["tests", "memcheck", "racecheck", "initcheck"] in [[s.name for s in g] for g in groups]
    assert sum(max(stage.budget for stage in group) for group in groups) <= 60 * 8.7


def test_sanitizers_check_the_kernels_of_this_package_alone(tmp_path):
    by_name = {stage.name: stage.command for stage in gpu_report.stages("cuda", False, tmp_path)}
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = " ".join(by_name[tool])
        assert command.startswith(f"compute-sanitizer --tool {tool} --error-exitcode=99")
        assert "--kernel-name kns=rasa_ext" in command
        assert ("--weight-space" in command) == (tool == "initcheck")
    assert "--report-api-errors no" in " ".join(by_name["memcheck"])


def too_late_once(log: Path, text: str, monkeypatch) -> None:
    """Make the stages' clock jump by 1000 s once a log contains the text."""

    def now() -> float:
        return time.monotonic() + 1000 * (log.exists() and text in log.read_text())

    monkeypatch.setattr(staged, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))


def test_a_stage_out_of_time_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "GRACE", 0.1)
    too_late_once(tmp_path / "a-stage.log", "\n", monkeypatch)
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    record = run(python(code), 60.0, tmp_path)
    assert record["status"] == "out of time"
    child = int(record["tail"])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_stages_run_at_the_same_time_end_each_on_its_own(tmp_path):
    """Each stage waits for a file of the other, so both must run at once."""
    code = (
        "import pathlib, sys, time\n"
        "mine, other, status = sys.argv[1:]\n"
        "pathlib.Path(mine).touch()\n"
        "while not pathlib.Path(other).exists(): time.sleep(0.01)\n"
        "raise SystemExit(int(status))"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    words = ((a, b, "0"), (b, a, "3"))
    stages = [staged.Stage(w[0][-1], (sys.executable, "-c", code, *w), 60) for w in words]
    first, second = staged.run(stages, 60.0, tmp_path)
    assert (first["status"], second["status"], second["exit"]) == ("ok", "failed", 3)


@pytest.mark.parametrize(
    ("code", "limit", "status", "said"),
    [
        ("import time; time.sleep(600)", 1.0, "cut", "1 rows"),
        ("import os; os.kill(os.getpid(), 9)", 60.0, "failed", "ended by signal 9, 1 rows"),
    ],
)
def test_rows_of_a_benchmark_that_does_not_end_are_kept(code, limit, status, said, tmp_path):
    records.Results(tmp_path / "a.json", "cpu").add(us=1.5)
    record = run(python(code, rows="a.json"), limit, tmp_path)
    assert (record["status"], record["rows"]) == (status, [{"us": 1.5}])
    assert staged.said(record) == said


def test_a_benchmark_without_rows_has_failed(tmp_path):
    record = run(python("print('nothing to measure')", rows="a.json"), 60.0, tmp_path)
    assert record["status"] == "failed"
    assert staged.said(record) == "0 rows, nothing to measure"


def test_tests_that_are_cut_short_leave_what_they_found(tmp_path, monkeypatch):
    # By a second after the first test's end, pytest has written the test's result to its file.
    begun = tmp_path / "begun"
    too_late_once(begun, "slow", monkeypatch)
    (tmp_path / "test_two.py").write_text(
        "import pathlib, time\n"
        "def test_fast(): assert False\n"
        "def test_slow():\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(begun)!r}).write_text('slow')\n"
        "    time.sleep(600)\n"
    )
    junit = f"--junitxml={tmp_path / 'tests.xml'}"
    command = (sys.executable, "-m", "pytest", "-n", "1", "--rootdir", str(tmp_path), junit)
    record = run(staged.Stage("tests", (*command, str(tmp_path)), 60), 60.0, tmp_path)
    assert record["status"] == "out of time"
    assert record["counts"]["failures"] == 1
    assert "1 failures" in staged.said(record)


def test_an_interrupted_report_holds_what_ended(tmp_path, forked_python):
    command = (forked_python, "-m", "benchmarks.gpu_report", "--device", "cpu", "--quick")
    command = (*command, "--out", tmp_path, "--only", "operators once", "step")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
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
    with tarfile.open(tmp_path / "rest.tar.gz") as archive:
        assert "operators-once.log" in archive.getnames()


def measured(monkeypatch, tmp_path: Path) -> tuple[int, dict[str, dict]]:
    """Run the step benchmark; return its exit status and the first case's rows by variant."""
    path = tmp_path / "step.json"
    given = ["step", "--quick", "--device", "cpu", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["block", *given])
    monkeypatch.setattr(block, "cases", lambda *_: [("step", shapes.BLOCKS["tiny"], 6, 8, 1, 0.0)])
    with pytest.raises(SystemExit) as end:
        block.main()
    rows = json.loads(path.read_text())["rows"]
    return end.value.code, {row["variant"]: row for row in rows}


@pytest.mark.parametrize("wrong", [False, True])
def test_ours_that_raises_or_is_wrong_fails_and_the_others_are_measured(
    monkeypatch, tmp_path, wrong
):
    def broken(self, x):
        if not wrong:
            raise RuntimeError("no such kernel")
        return self.base_layer(x)

    monkeypatch.setattr(RasaLinear, "forward", broken)
    code, rows = measured(monkeypatch, tmp_path)
    assert code == 1
    for name in ("ours", "ours, fused"):
        why = "differs from official in y of" if wrong else "RuntimeError: no such kernel"
        assert rows.pop(name)["failed"].startswith(why)
    assert {"frozen", "official", "addmm", "peft r=8"} < set(rows)
    assert all(row["us"] > 0 for row in rows.values())


def test_peft_that_cannot_be_made_leaves_a_row(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, rows = measured(monkeypatch, tmp_path)
    assert code == 0
    assert "peft" in rows["peft r=8"]["failed"]
    assert rows["ours"]["us"] > 0


def test_without_a_baseline_there_is_no_ratio(tmp_path):
    results = records.Results(None, "cpu")
    rows = block.add_times(results, {"ours": [1.0, 2.0]}, {"ours": 0.5})
    assert rows["ours"]["over_frozen"] is None
    assert rows["ours"]["removed"] is None
    assert rows["ours"]["roofline"] == 3
    alike = {name: [1.0, 2.0] for name in ("frozen", "official", "ours")}
    assert block.add_times(results, alike, dict.fromkeys(alike, 0.5))["ours"]["removed"] is None


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


def test_rows_as_csv(tmp_path):
    kept = records.Results(tmp_path / "rows.csv", "cpu")
    kept.add(what="a", us=1.0)
    kept.add(what="b|c", gb=2.0)
    with open(tmp_path / "rows.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"what": "a", "us": "1.0", "gb": ""},
            {"what": "b|c", "us": "", "gb": "2.0"},
        ]


def test_the_harness_ends_when_its_time_is_over():
    seconds = harness.interleaved({"a": lambda: time.sleep(0.01)}, 1000, at_most=0.1)
    assert 2 <= len(seconds["a"]) < 1000


def test_a_step_has_what_was_predicted_beside_it():
    row = {"what": "step", "block": "llama-3.1-8b", "M": 8192, "r": 8, "R": 39, "variant": "ours"}
    found = staged.with_prediction(row, "NVIDIA H100 80GB HBM3")
    fused = predict.step("llama-3.1-8b", 8192, 8, "H100", "ours fused")
    frozen = predict.step("llama-3.1-8b", 8192, 8, "H100", "frozen")
    assert found["predicted_us"] == pytest.approx(1e3 * fused.ms)
    assert found["predicted_over_frozen"] == pytest.approx(fused.ms / frozen.ms)
    dropped = staged.with_prediction({**row, "dropout": 0.05}, "NVIDIA H100 80GB HBM3")
    assert dropped["predicted_us"] > found["predicted_us"]
    library = staged.with_prediction({**row, "variant": "ours, cublas"}, "NVIDIA H100 80GB HBM3")
    assert library["predicted_us"] > found["predicted_us"]
    wide = staged.with_prediction({**row, "variant": "peft r=39"}, "NVIDIA H100 80GB HBM3")
    assert wide["predicted_us"] > found["predicted_us"]
    unknown = [
        ({**row, "variant": "ours (PyTorch)"}, "NVIDIA H100 80GB HBM3"),
        ({**row, "block": "tiny"}, "NVIDIA H100 80GB HBM3"),
        ({**row, "what": "decode"}, "NVIDIA H100 80GB HBM3"),
        (row, "NVIDIA B200"),
        ({"operator": "pack_group"}, "NVIDIA H100 80GB HBM3"),
    ]
    for other, card in unknown:
        assert staged.with_prediction(other, card) == other
