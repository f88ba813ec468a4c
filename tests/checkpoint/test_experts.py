"""Adapters of stacked experts in the package's own file format."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import rasa_ext
from tests.helpers import experts
from tests.helpers.adapters import same_adapters
from tests.helpers.experts import EXPERTS, FAMILIES, GROUPINGS, HIDDEN, INNER
from tests.helpers.refusals import refused

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
    assert rasa_ext.save_adapter(model, tmp_path) is None
    fresh = entry.build()
    assert rasa_ext.load_adapter(fresh, tmp_path) is fresh
    assert same_adapters(model, fresh)
    again = experts.patched(entry.build(), grouping, 3, k, dropout=0.1, **options)
    again = copy.deepcopy(again)  # a copy shares no tensors with the original
    experts.randomize(again, 8)
    assert not same_adapters(model, again)
    rasa_ext.load_adapter(again, tmp_path)
    assert same_adapters(model, again)
    inputs = entry.inputs(0)
    logits = [entry.loss(each.eval(), inputs)[0] for each in (model, fresh, again)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_names_and_shapes(grouping, tmp_path):
    """Each tensor is stored once, under its weight's name; a pool under its first layer."""
    rasa_ext.save_adapter(experts.patched(experts.model("gpt_oss"), grouping, 3, 1), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    pooled = EXPERTS if grouping == "layer" else 2
    each = (EXPERTS,) if grouping == "slot" else ()
    expected = {}
    for layer in range(2):
        for weight, out, width in (
            ("gate_up_proj", 2 * INNER, HIDDEN),
            ("down_proj", HIDDEN, INNER),
        ):
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{weight}.rasa_"
            expected[f"{key}A"] = (EXPERTS, 2, width)
            expected[f"{key}B"] = (EXPERTS, out, 2)
            expected[f"{key}d"] = (EXPERTS, 2 + pooled)
            if layer == 0 or grouping == "layer":
                expected[f"{key}pool_A"] = (*each, pooled, width)
                expected[f"{key}pool_B"] = (*each, out, pooled)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rasa_experts"] == grouping
    assert config["r"] == 3


def test_a_file_without_experts_says_nothing_of_them(tmp_path):
    with pytest.warns(UserWarning, match="stay untouched"):
        model = rasa_ext.patch_model(experts.model(), 3, 1)
    rasa_ext.save_adapter(model, tmp_path)
    assert "rasa_experts" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_router_that_is_trained_in_full(tmp_path):
    model = experts.patched(experts.model(), "shared", modules_to_save=["gate"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.add_(0.5)
    rasa_ext.save_adapter(model, tmp_path)
    fresh = rasa_ext.load_adapter(experts.model(), tmp_path)
    assert same_adapters(model, fresh)
    assert fresh.model.layers[1].mlp.gate.weight.requires_grad


def test_one_weight_alone(tmp_path):
    model = experts.patched(experts.model(), "slot", target_modules=["experts.down_proj"])
    rasa_ext.save_adapter(model, tmp_path)
    assert same_adapters(model, rasa_ext.load_adapter(experts.model(), tmp_path))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: experts.model(num_local_experts=6), r"gate_up_proj\.rasa_"),
        (lambda: experts.model(num_hidden_layers=3), r"gate_up_proj\.rasa_"),
        (lambda: experts.patched(experts.model(), "shared"), "experts: 'shared', 'slot'"),
    ],
)
def test_an_adapter_of_another_model(other, said, tmp_path):
    rasa_ext.save_adapter(experts.patched(experts.model(), "slot"), tmp_path)
    model = other()
    refused(lambda: rasa_ext.load_adapter(model, tmp_path), model, said)
