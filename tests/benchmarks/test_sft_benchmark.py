"""The benchmark of SFTTrainer, run with a tiny model. No test checks times."""

import json
import sys

import pytest
import torch

from benchmarks import sft


def test_it_leaves_a_row_for_each_variant(tmp_path, monkeypatch, capsys):
    """Two rounds of three steps, the first not timed, give equal results for all forms of RaSA."""
    path = tmp_path / "sft.json"
    monkeypatch.setattr(sft.harness, "pin_allocator", lambda: None)  # would outlive the test
    monkeypatch.setattr(sys, "argv", ["sft", "--quick", "--json", str(path)])
    sft.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == list(sft.VARIANTS)
    for row in rows:
        assert (row["dtype"], row["rounds"], row["steps"]) == ("float32", 2, 4)
        low, middle, high = row["ms"]
        assert 0 < low <= middle <= high
    assert rows[0]["over_lora"] == 1
    printed = capsys.readouterr().out
    assert printed.count("verified: ") == 4


def test_ratios_are_to_lora_in_the_same_round():
    took = {sft.LORA: [[1.0, 1.0], [2.0, 2.0]], sft.OURS: [[2.0, 2.0], [3.0, 3.0]]}
    lora, ours = sft.summary("float32", took)
    assert lora["over_lora_by_rounds"] == (1, 1, 1)
    assert ours["over_lora_by_rounds"] == pytest.approx((1.625, 1.75, 1.875))
    assert ours["over_lora"] == pytest.approx(2.5 / 1.5)
    assert ours["ms"] == pytest.approx((2000, 2500, 3000))


def test_forms_that_differ_are_not_timed():
    values = dict.fromkeys(sft.VARIANTS, torch.ones(3))
    sft.agree(values, 1e-4, "logits")
    for name in (sft.OURS, sft.OFFICIAL):
        for wrong in (torch.full((3,), 1.1), torch.full((3,), float("nan"))):
            with pytest.raises(SystemExit, match=f"logits of {name}"):
                sft.agree({**values, name: wrong}, 1e-4, "logits")
