"""The benchmark of stacked experts, run with a tiny layer. No test checks times."""

import json
import sys

import pytest
import torch

from benchmarks import experts

pytest.importorskip("peft")

SHAPE = experts.Shape(**experts.QUICK)
VARIANTS = ["frozen, grouped_mm", "frozen, eager", "PEFT r=8, grouped_mm", "PEFT r=8, eager"]
VARIANTS += ["PEFT r=4, grouped_mm", "slot", "layer", "shared", "shared, pool only"]


def test_it_leaves_a_row_for_each_variant(tmp_path, monkeypatch, capsys):
    path = tmp_path / "experts.json"
    monkeypatch.setattr(experts.harness, "pin_allocator", lambda: None)  # would outlive the test
    arguments = ["experts", "--quick", "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    experts.main()
    rows = json.loads(path.read_text())["rows"]
    for dtype in ("float32", "bfloat16"):
        found = {row["variant"]: row for row in rows if row["dtype"] == dtype}
        assert list(found) == VARIANTS
        for row in found.values():
            low, middle, high = row["ms"]
            assert 0 < low <= middle <= high
            assert 0 < row["saved, MiB"] < row["peak, MiB"]
        assert min(row["/ frozen"] for row in list(found.values())[:2]) == 1
        assert min(row["/ PEFT"] for row in list(found.values())[2:4]) == 1
    assert "load before the run" in capsys.readouterr().out


@pytest.mark.parametrize("tensor", ["A", "B", "d"])
def test_experts_that_compute_something_else_are_not_timed(tensor, monkeypatch):
    case = experts.Case(SHAPE, torch.float32)
    module = case.variants()["shared"]
    case.verify("shared", module)
    merged = case._merged(module)
    with torch.no_grad():
        getattr(module.stacks()["down_proj"], tensor)[0] *= 1.1
    monkeypatch.setattr(case, "_merged", lambda module: merged)
    with pytest.raises(RuntimeError, match=r"^shared "):
        case.verify("shared", module)
