"""Adapters of stacked experts in the package's own file format."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import rasa_ext
from tests.helpers import experts
from tests.helpers.adapter_folders import not_loaded
from tests.helpers.adapters import same_adapters
from tests.helpers.experts import FAMILIES, GROUPINGS

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("family", "grouping", "k"),
    [(family, "shared", 1) for family in FAMILIES]
    + [("mixtral", grouping, k) for grouping in GROUPINGS for k in (0, 1, 3)],
)
def test_round_trip(family, grouping, k, tmp_path):
    entry = experts.entry(family)
    options = {"target_modules": "all-linear", "exclude_modules": ("shared_expert_gate",)}
    model = experts.patched(entry.build(), grouping, 3, k, dropout=0.1, **options)
    rasa_ext.save_adapter(model, tmp_path)
    fresh = rasa_ext.load_adapter(entry.build(), tmp_path)
    assert same_adapters(model, fresh)
    again = copy.deepcopy(model)  # which shares no tensors with the original
    experts.randomize(again, 8)
    assert not same_adapters(model, again)
    rasa_ext.load_adapter(again, tmp_path)
    assert same_adapters(model, again)
    inputs = entry.inputs(0)
    expected = entry.loss(model.eval(), inputs)[0]
    for each in (fresh, again):
        assert torch.equal(entry.loss(each.eval(), inputs)[0], expected)


def test_a_file_without_experts_says_nothing_of_them(tmp_path):
    with pytest.warns(UserWarning, match="stay untouched"):
        model = rasa_ext.patch_model(experts.model(), 3, 1)
    rasa_ext.save_adapter(model, tmp_path)
    assert "rasa_experts" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: experts.model(num_local_experts=6), r"gate_up_proj\.rasa_"),
        (lambda: experts.patched(experts.model(), "shared"), "experts: 'shared', 'slot'"),
    ],
)
def test_an_adapter_of_another_model(other, said, tmp_path):
    rasa_ext.save_adapter(experts.patched(experts.model(), "slot"), tmp_path)
    not_loaded(rasa_ext.load_adapter, other(), tmp_path, said)
