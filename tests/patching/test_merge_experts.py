"""merge, unmerge, delta_weights, disable_adapter and unpatch over stacked experts."""

import pytest
import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.patching import parts
from rasa_ext.patching.state import adapted_experts
from tests.helpers import experts
from tests.helpers.expert_files import adapted as patched
from tests.helpers.expert_files import changes, logits, stacks
from tests.helpers.experts import GROUPINGS
from tests.helpers.refusals import Snapshot, refused

FAMILIES = ("mixtral", "gpt_oss", "llama4_text")


def base_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = experts.model(family).to(dtype).eval()
    model.config._experts_implementation = "eager"
    return model


def stacked(model: nn.Module, name: str) -> Tensor:
    """Return a stacked weight of a patched or plain model as (E, out, in)."""
    path, _, key = name.rpartition(".")
    experts = model.get_submodule(path)
    weight = getattr(getattr(experts, "base_layer", experts), key).detach()
    return weight.transpose(1, 2) if getattr(experts, "is_transposed", True) else weight


@pytest.mark.parametrize(
    ("family", "grouping", "k", "dtype"),
    [(family, grouping, 1, torch.float32) for family in FAMILIES for grouping in GROUPINGS]
    + [("gpt_oss", grouping, k, torch.bfloat16) for grouping in GROUPINGS for k in (0, 3)]
    + [("mixtral", grouping, 1, torch.float64) for grouping in GROUPINGS],
)
def test_merging_adds_dw_and_unmerging_takes_it_out(family, grouping, k, dtype):
    base = base_model(family, dtype)
    model = patched(base, grouping, k)
    before, expected = Snapshot(model), changes(model)
    largest = rasa_ext.merge(model)
    wide = torch.promote_types(dtype, torch.float32)
    for name, change in expected.items():
        exact = stacked(base, name).double() + change
        close = {"rtol": torch.finfo(dtype).eps, "atol": 8 * torch.finfo(wide).eps}
        torch.testing.assert_close(stacked(model, name).double(), exact, **close)
    assert largest >= max(each.abs().max() for each in expected.values()) * (1 - 1e-6)
    rasa_ext.unmerge(model)
    before.assert_unchanged()
    assert not any(module.merged for _, module in adapted_experts(model))


@pytest.mark.parametrize("chunk", [0, parts.CHUNK_BYTES], ids=["one by one", "whole"])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", [*experts.FAMILIES, "llama4_text"])
def test_a_merged_model_computes_what_the_adapted_one_does(family, grouping, chunk, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", chunk)
    model = patched(base_model(family), experts=grouping)
    adapted = logits(model)
    rasa_ext.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    with rasa_ext.disable_adapter(model):
        assert torch.equal(logits(model), logits(base_model(family)))
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    merged = rasa_ext.merge_and_unload(patched(base_model(family), experts=grouping))
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(base_model(family).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_lie_as_their_parameters_do(family):
    """dW has the parameter's layout, so that users can add it, even if the shape is square."""
    base = base_model(family)
    model = patched(base, experts="shared", target_modules=r".*experts\.\w+_proj")
    for name, dW in rasa_ext.delta_weights(model):
        assert dW.dtype == torch.float32
        base.get_parameter(name).data += dW
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-4)


def test_a_merge_that_overflows_changes_no_expert():
    model = patched(base_model("mixtral", torch.float16), experts="layer")
    stack = stacks(model)["model.layers.1.mlp.experts.down_proj"]
    with torch.no_grad():
        stack.B[3].fill_(1e6)
    for call in (rasa_ext.merge, rasa_ext.merge_and_unload):
        refused(lambda call=call: call(model), model, r"layers\.1\.mlp\.experts\.down_proj\[3\]")
    logits(model)
