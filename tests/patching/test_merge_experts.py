"""merge, unmerge, delta_weights, disable_adapter and unpatch over stacked experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.patching import parts
from rasa_ext.patching.state import adapted_experts
from tests.helpers import experts
from tests.helpers.expert_files import changes, stacks
from tests.helpers.experts import EXPERTS, GROUPINGS

FAMILIES = ("mixtral", "gpt_oss", "llama4_text")


def base_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = experts.model(family).to(dtype).eval()
    model.config._experts_implementation = "eager"
    return model


def patched(model: nn.Module, k: int = 1, **options) -> nn.Module:
    model = rasa_ext.patch_model(copy.deepcopy(model), rank=4, k=k, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def stacked(model: nn.Module, name: str) -> Tensor:
    """A stacked weight of a model, patched or plain, as (E, out, in)."""
    path, _, key = name.rpartition(".")
    experts = model.get_submodule(path)
    weight = getattr(getattr(experts, "base_layer", experts), key).detach()
    return weight.transpose(1, 2) if getattr(experts, "is_transposed", True) else weight


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_adds_dw_and_unmerging_takes_it_out(family, grouping, k, dtype):
    base = base_model(family, dtype)
    model = patched(base, k, experts=grouping)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = changes(model)
    largest = rasa_ext.merge(model)
    wide = torch.promote_types(dtype, torch.float32)
    for name, change in expected.items():
        exact = stacked(base, name).double() + change
        close = {"rtol": torch.finfo(dtype).eps, "atol": 8 * torch.finfo(wide).eps}
        torch.testing.assert_close(stacked(model, name).double(), exact, **close)
    assert largest >= max(each.abs().max() for each in expected.values()) * (1 - 1e-6)
    rasa_ext.unmerge(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not any(module.merged for _, module in adapted_experts(model))


@pytest.mark.parametrize("chunk", [0, parts.CHUNK_BYTES], ids=["one by one", "whole"])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_what_the_adapted_one_does(family, grouping, chunk, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", chunk)
    model = patched(base_model(family), experts=grouping)
    adapted = output(model)
    rasa_ext.merge(model)
    torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-4)
    with rasa_ext.disable_adapter(model):
        assert torch.equal(output(model), output(base_model(family)))
    torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-4)
    merged = rasa_ext.merge_and_unload(patched(base_model(family), experts=grouping))
    torch.testing.assert_close(output(merged), adapted, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(base_model(family).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_and_unpatched_models_are_the_base(family):
    base = base_model(family)
    model = patched(base, experts="shared")
    assert not torch.equal(output(model), output(base))
    with rasa_ext.disable_adapter(model):
        assert torch.equal(output(model), output(base))
    plain = rasa_ext.unpatch(model)
    assert torch.equal(output(plain), output(base))
    assert [*plain.state_dict()] == [*base.state_dict()]
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_subtracting_restores_every_expert(grouping):
    model = patched(base_model("gpt_oss", torch.bfloat16), experts=grouping)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rasa_ext.merge(model, subtract=True)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len([name for name in changed if "experts" in name]) == 4
    rasa_ext.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_lie_as_their_parameters_do(family):
    """So that they can be added to those, also where these are square."""
    base = base_model(family)
    model = patched(base, experts="shared", target_modules=r".*experts\.\w+_proj")
    for name, dW in rasa_ext.delta_weights(model):
        base.get_parameter(name).data += dW
    torch.testing.assert_close(output(base), output(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_changes_of_weights_come_under_their_parameters_names(grouping):
    model = patched(base_model("mixtral"), experts=grouping, target_modules=["down_proj", "v_proj"])
    found = dict(rasa_ext.delta_weights(model))
    names = [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    assert [name for name in found if "experts" in name] == names
    for name in names:
        assert found[name].shape == (EXPERTS, 16, 24)
        assert found[name].dtype == torch.float32
        expected = changes(model)[name]
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_overflows_changes_no_expert():
    model = patched(base_model("mixtral", torch.float16), experts="layer")
    stack = stacks(model)["model.layers.1.mlp.experts.down_proj"]
    with torch.no_grad():
        stack.B[3].fill_(1e6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\[3\]"):
        rasa_ext.merge(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\[3\]"):
        rasa_ext.merge_and_unload(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    output(model)


def test_a_merged_model_is_not_trained():
    model = patched(base_model("mixtral"), experts="shared")
    rasa_ext.merge(model)
    model.train()
    with pytest.raises(RuntimeError, match="unmerge"):
        model(torch.arange(6)[None])
