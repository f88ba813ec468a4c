"""The whole report with a stand-in for the GPU and its programs. No test checks times."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, traffic
from tests.helpers import stand_in_cuda

ROOT = Path(__file__).resolve().parents[2]
OFF = "ours, each alone"
BENCHMARKS = ("step", "one linear", "all layers", "decode", "growth", "profile", "traffic")
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


def report(python: Path, out: Path, *arguments: str, **variables: str) -> tuple[int, dict, str]:
    """Run a report with tiny shapes; return exit status, report.json and output."""
    command = (python, "-m", "benchmarks.gpu_report", "--quick", "--out", out, *arguments)
    # Skip compilation: torch.compile on a CPU is not tested here.
    variables = {**os.environ, "TORCHDYNAMO_DISABLE": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    output = done.stdout + done.stderr
    return done.returncode, json.loads((out / "report.json").read_text()), output


@pytest.fixture(scope="module")
def python(tmp_path_factory, forked_python) -> Path:
    """A Python with the stand-in for CUDA."""
    return stand_in_cuda.program(forked_python, tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, python) -> tuple[Path, dict]:
    """Folder and content of a report without failures."""
    out, programs = tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("bin")
    for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    counts = programs / "counts.csv"
    counts.write_text(lines_of_ncu(len(traffic.STEPS)))
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "STAND_IN_COUNTS": str(counts)}
    variables |= {stand_in_cuda.KERNELS: "1"}
    code, found, output = report(python, out, "--commit", "abc1234", **variables)
    assert code == 0, output + (out / "report.md").read_text()
    return out, found


def test_every_stage_runs_and_leaves_its_rows(whole):
    _, found = whole
    assert found["complete"]
    checks = ["tests", "memcheck", "racecheck", "initcheck"]
    names = ["build", "operators once", "step", *checks, *BENCHMARKS[1:], "compiled"]
    assert [stage["name"] for stage in found["stages"]] == names
    assert {stage["status"] for stage in found["stages"]} == {"ok"}
    by_name = {stage["name"]: stage for stage in found["stages"]}
    assert by_name["tests"]["counts"]["tests"] > 0
    assert by_name["tests"]["counts"]["failures"] == 0
    assert all(by_name[name]["rows"] for name in BENCHMARKS)


def test_the_files_are_few(whole):
    out, _ = whole
    names = {path.name for path in out.iterdir()}
    assert names == {"report.md", "report.json", "step.json", "tests.xml", "rest.tar.gz"}
    with tarfile.open(out / "rest.tar.gz") as archive:
        inside = set(archive.getnames())
        trace = archive.extractfile("ours.trace.json").read().decode()
        picture = archive.extractfile("step.png").read()
    assert {"memcheck.log", "tests.log", "decode.json", "official.txt"} < inside
    assert "rasa_ext.low_rank_linear_backward" in trace
    assert picture.startswith(b"\x89PNG")


def test_the_matrix_holds_every_baseline_and_column(whole):
    (rows,) = (stage["rows"] for stage in whole[1]["stages"] if stage["name"] == "step")
    first = {row["variant"]: row for row in rows if row["dropout"]}
    ours = {"ours", "ours, cublas", OFF}
    assert {"frozen", "official", "addmm", "peft r=8", "peft r=11"} | ours == set(first)
    assert {row["dropout"] for row in rows} == {0.05, 0.0}
    assert first["frozen"]["over_frozen"] == first["frozen"]["graph_over_frozen"] == 1
    assert first["official"]["removed"] == 0
    assert first["frozen"]["saved"] == 0
    assert first["ours"]["saved"] <= first[OFF]["saved"] < first["official"]["saved"]
    for row in rows:
        assert row["us_low"] <= row["us"] <= row["us_high"]
        assert row["roofline"] > 0
        assert row["peak"] > 0
        assert row["host_us"] > 0
        assert row["graph_us"] > 0


def test_single_products_are_told_apart(whole):
    (rows,) = (stage["rows"] for stage in whole[1]["stages"] if stage["name"] == "one linear")
    assert rows[0]["copy_gb_s"] > 0
    by_name = {row["what"]: row for row in rows if "tb_s" in row}
    products = {"U = X Ap^T, Y + U Bp", "the same, dropout", "H = G Bp^T, dX = H Ap"}
    products |= {"dBp = U^T G", "H, dAp = H^T X", "H, dAp, dropout", "H, dBp, dAp"}
    products |= {f"{name}, cublas" for name in products}
    assert set(by_name) == {*products, "Y += X W^T", "Y = X W^T", "dX += G W", "dX = G W"}
    assert all(row["us"] > 0 and row["tb_s"] > 0 for row in by_name.values())


def test_traffic_is_summed_between_marks(whole):
    (rows,) = (stage["rows"] for stage in whole[1]["stages"] if stage["name"] == "traffic")
    assert [(row["variant"], row["dropout"]) for row in rows] == [s[:2] for s in traffic.STEPS]
    for row in rows:
        assert (row["read_gib"], row["written_gib"], row["gib"], row["kernels"]) == (3, 1, 4, 2)


def test_the_machine_and_the_commit_are_named(whole):
    out, found = whole
    machine, text = found["machine"], (out / "report.md").read_text()
    assert machine["torch"] == torch.__version__
    assert machine["cuda"] == torch.version.cuda
    assert machine["commit"] == "abc1234"
    assert machine["card"].startswith("NVIDIA Stand-in")
    assert "the times mean nothing" in text


@pytest.fixture(scope="module")
def bad(tmp_path_factory, python) -> tuple[Path, dict]:
    """Folder and stages of a report with failures: no built kernels, a baseline that raises, a test
    file that cannot be imported, and neither the sanitizer nor Nsight Compute installed."""
    out, folder = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("tests")
    (folder / "test_not_to_be_imported.py").write_text("import a_package_that_is_not_there\n")
    variables = {
        "PYTEST_ADDOPTS": f"-c {ROOT / 'pyproject.toml'} {folder}",
        stand_in_cuda.BREAK: "benchmarks.baselines:AddmmLinear.forward",
    }
    only = ("build", "operators once", "step", "tests", "memcheck", "decode", "traffic")
    code, found, output = report(python, out, "--only", *only, **variables)
    assert code == 1, output
    return out, {stage["name"]: stage for stage in found["stages"]}


def test_a_failed_build_stops_no_later_stage_and_names_what_was_measured(bad):
    out, stages = bad
    assert stages["build"]["status"] == "failed"
    assert "CUDA kernels cannot be built" in stages["build"]["tail"]
    assert stages["operators once"]["status"] == "failed"
    assert "no kernels to check: 0 of" in stages["operators once"]["tail"]
    names = {row["variant"] for row in stages["step"]["rows"]}
    assert {"ours (PyTorch)", "ours (PyTorch), each alone"} < names
    assert not {"ours", OFF} & names
    assert "no kernels to check" in (out / "report.md").read_text()


def test_a_variant_that_raises_costs_no_other_its_row(bad):
    for name in ("step", "decode"):
        rows = bad[1][name]["rows"]
        assert bad[1][name]["status"] == "ok"
        failed = {row["variant"]: row["failed"] for row in rows if "failed" in row}
        assert failed == {"addmm": "RuntimeError: broken for a test"}
        measured = [row for row in rows if "failed" not in row]
        assert all(row["us"] > 0 for row in measured)
        assert {"frozen", "official", "ours (PyTorch)"} < {row["variant"] for row in measured}


def test_a_file_of_tests_that_cannot_be_imported_stops_no_other(bad):
    stage = bad[1]["tests"]
    assert stage["status"] == "failed"
    assert stage["counts"]["errors"] == 1
    assert stage["counts"]["tests"] > 1
    assert "a_package_that_is_not_there" in stage["tail"]


def test_programs_that_are_absent_are_named(bad):
    stages = bad[1]
    assert stages["memcheck"]["status"] == stages["traffic"]["status"] == "skipped"
    assert stages["memcheck"]["tail"] == "compute-sanitizer is not on PATH"
    assert stages["traffic"]["tail"] == "ncu is not on PATH"


def test_the_first_case_gets_all_its_rounds_whatever_time_is_left(python, tmp_path):
    rows = tmp_path / "step.json"
    given = ("step", "--device", "cuda", "--quick", "--rounds", "30", "--seconds", "0")
    command = (python, "-m", "benchmarks.block", *given, "--json", rows)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *first, last = json.loads(rows.read_text())["rows"]
    assert {row["rounds"] for row in first} == {30}
    assert {(row["M"], row["r"]) for row in first} == {(40, 8)}
    assert last == {"what": "not run: out of time", "left": 1}


def test_a_device_waits_while_the_host_launches(monkeypatch):
    """The device sleeps 1.5 times as long as the previous launches took."""
    slept = []
    for name, value in {**stand_in_cuda.ANSWERS, "_sleep": slept.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with stand_in_cuda.OnCpu():
        run = {"a": lambda: time.sleep(0.01)}
        harness.interleaved(run, 2, warmup=1, device="cuda", hide_launches=True)
    first, *others = slept
    assert first == 1.5e-3 * harness._CYCLES
    assert len(others) == 2
    assert all(each >= 1.5e-2 * harness._CYCLES for each in others)
