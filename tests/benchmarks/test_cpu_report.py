"""The report for a CPU, run with tiny shapes. No test checks times."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cpu_report, harness, records
from tests.helpers.processes import run_whole

ROOT = Path(__file__).resolve().parents[2]


def test_it_leaves_json_text_and_a_picture(tmp_path, forked_python):
    command = (forked_python, "-m", "benchmarks.cpu_report", "--quick", "--out", tmp_path)
    run_whole([*command, "--name", "here", "--only", "layer", "host", "profile"], cwd=ROOT)
    report = json.loads((tmp_path / "cpu-here.json").read_text())
    assert report["complete"]
    layer, host, profile = report["stages"]
    assert host["rows"][0]["rasa_ext"] > 0
    low, middle, high = layer["rows"][0]["ours_us"]
    assert 0 < low <= middle <= high
    assert {row["variant"] for row in profile["rows"]} == {"frozen", "official", "ours"}
    text = (tmp_path / "cpu-here.md").read_text()
    assert "the times mean nothing" in text
    assert "(cpu-here.png)" in text
    assert (tmp_path / "cpu-here.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_fits_the_time_limit(tmp_path):
    planned = cpu_report.stages(False, tmp_path)
    names = {stage.name for stage in planned}
    # What docs/benchmarks.md shows, then the rest.
    assert {"layer", "model", "bfloat16", "few tokens", "sft", "host", "decode"} < names
    assert {"step", "growth", "all layers", "compiled"} < names
    assert len({stage.rows for stage in planned}) == len(planned)
    assert sum(stage.budget for stage in planned) <= 34 * 60


def test_an_interval_in_a_row_has_a_cell():
    row = {"ratio": 0.8, "ratio_90": (0.7, 0.9), "ms": (1.0, 2.0, 3.0)}
    assert records.table([row]).endswith("| 0.8 | 0.7 to 0.9 | 2 (1-3) |")


def test_an_unknown_stage_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cpu_report", "--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit, match=r"^--only: "):
        cpu_report.main()


def test_a_cold_call_finds_the_caches_overwritten(monkeypatch):
    """Before each call, twice the size of the last cache is written."""
    written = []
    monkeypatch.setattr(harness, "_last_cache_bytes", lambda: 1 << 10)
    zero = harness.torch.Tensor.zero_
    monkeypatch.setattr(
        harness.torch.Tensor, "zero_", lambda t: written.append(t.nbytes) or zero(t)
    )
    harness.interleaved({"a": lambda: None}, 2, warmup=1, cold=True)
    assert written == [2 << 10] * 3


def test_an_overhead_is_of_differences_by_round():
    """A machine that slows down does not change the ratio, nor does a single slow call."""
    slower = [1.0, 2.0, 3.0, 4.0, 5.0]
    adds = {"frozen": 0.0, "official": 0.4, "ours": 0.3}
    seconds = {name: [base + more for base in slower] for name, more in adds.items()}
    seconds["ours"][1] += 9.0
    seconds["official"][3] += 9.0
    assert harness.overhead_ratio(seconds, "ours", "official", "frozen") == pytest.approx(0.75)


def test_the_interval_of_an_overhead_widens_with_the_rounds_spread():
    def interval(spread):
        noise = [spread * (i % 5 - 2) for i in range(40)]
        ours = [1.3 + each for each in noise]
        seconds = {"frozen": [1.0] * 40, "official": [1.4] * 40, "ours": ours}
        low, high = harness.overhead_interval(seconds, "ours", "official", "frozen")
        assert low <= harness.overhead_ratio(seconds, "ours", "official", "frozen") <= high
        return high - low

    assert interval(0.0) == 0
    assert 0 < interval(0.01) < interval(0.1)
