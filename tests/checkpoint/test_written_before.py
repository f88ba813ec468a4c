"""Adapters in files that were written while a group's first layer owned the pool.

``written`` has the folders of ``save_adapter`` and of PEFT, and a whole model's state.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import rasa_ext
from rasa_ext.patching import owners
from tests.helpers.adapters import same_bits
from tests.helpers.peft import WEIGHTS
from tests.helpers.peft_sides import needs_experts

WRITTEN = Path(__file__).parent / "written"
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}
EXPERTS = ["experts_slot", "experts_layer", "experts_shared", "peft_experts"]
FOLDERS = ["rasa", "pool_only", "lora", "peft"]


def base(folder: str) -> nn.Module:
    if folder in EXPERTS:
        config = MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
        return MixtralForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    "folder", [*FOLDERS, *(pytest.param(each, marks=needs_experts) for each in EXPERTS)]
)
def test_an_adapter_is_read_and_written_again(folder, tmp_path):
    model = rasa_ext.load_adapter(base(folder), WRITTEN / folder)
    written = load_file(WRITTEN / folder / WEIGHTS)
    for name, owner in owners(model):
        for field, tensor in owner.own_tensors().items():
            assert same_bits(tensor, written[f"base_model.model.{name}.rasa_{field}"])
    assert any(".rasa_pool_" in key for key in written) or folder == "lora"
    rasa_ext.save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft = PeftModel.from_pretrained(base(folder), WRITTEN / folder)
    peft.save_pretrained(tmp_path / "peft")
    for name in ("ours", "peft"):
        again = load_file(tmp_path / name / WEIGHTS)
        assert again.keys() == written.keys()
        assert all(same_bits(again[key], written[key]) for key in written)


def test_a_whole_model_is_read(tmp_path):
    expected = rasa_ext.load_adapter(base("rasa"), WRITTEN / "rasa")
    config = rasa_ext.patching.state.patch_state(expected).config
    model = rasa_ext.patch_model(base("rasa"), config=config)
    rasa_ext.load_adapter(model, WRITTEN / "whole")
    for found, other in zip(owners(model), owners(expected), strict=True):
        pairs = zip(found[1].adapter().sources(), other[1].adapter().sources(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
