"""What makes adapters of linear layers alone, over models that stack experts."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import rasa_ext
from tests.helpers.expert_files import RANK, adapted, banks, build, logits
from tests.helpers.experts import HIDDEN
from tests.helpers.refusals import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*stay untouched", "ignore:.*SGLang")

base = functools.cache(build)
BANK = "model.layers.0.mlp.experts.gate_up_proj"


def states(seed=0):
    """A base's tensors, and the same with every one changed."""
    before = {name: t.clone() for name, t in base("mixtral").state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    after = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in before.items()}
    return before, after


def test_compress_tells_what_experts_lost():
    before, after = states()
    model = copy.deepcopy(base("mixtral"))
    found = rasa_ext.compress(model, before, after, rank=RANK, k=1, iterations=2)
    names = {name for group in found.plan.groups for name in group.names}
    assert all("experts" not in name for name in names)
    change = (after[BANK].double() - before[BANK].double()).norm().item()
    assert found.lost[BANK].change == pytest.approx(change)
    assert found.residual_share > 0.5  # experts are most of this model
    found.install(model)
    assert not banks(model)
    assert torch.equal(model.get_parameter(BANK), before[BANK])


def test_fit_adapter_leaves_experts_alone():
    name = "model.layers.0.self_attn.q_proj"
    model = copy.deepcopy(base("mixtral"))
    rasa_ext.fit_adapter(model, {name: torch.randn(HIDDEN, HIDDEN)}, RANK, 0, iterations=2)
    assert not banks(model)
    for deltas in (
        {BANK: torch.randn(5, 48, HIDDEN)},
        {BANK: torch.randn(48, HIDDEN)},
        {name: torch.randn(HIDDEN, HIDDEN), "model.layers.0.mlp.experts": torch.randn(4, 4)},
    ):
        plain = copy.deepcopy(base("mixtral"))
        before = Snapshot(plain)
        with pytest.raises((TypeError, ValueError), match="deltas"):
            rasa_ext.fit_adapter(plain, deltas, RANK, 0, iterations=2)
        before.assert_unchanged()
    with pytest.raises((TypeError, ValueError), match="deltas"):
        rasa_ext.decompose([torch.randn(5, 48, HIDDEN)], RANK, 0)


def test_a_patched_model_is_refused():
    model = adapted(base("mixtral"), target_modules=r".*\.experts\.\w+")
    before = Snapshot(model)
    for call in (
        lambda: rasa_ext.fit_adapter(model, {"lm_head": torch.randn(32, HIDDEN)}, 2, 0),
        lambda: rasa_ext.compress(model, *states(), rank=2, k=0),
    ):
        with pytest.raises(ValueError, match="expected an unpatched model"):
            call()
    before.assert_unchanged()


@pytest.mark.parametrize("layout", ["peft", "per-expert", "shared-outer"])
def test_import_lora_refuses_experts(layout, tmp_path):
    """None of the layouts is taken for a LoRA of linear layers, not even in part."""
    rasa_ext.export_lora(adapted(base("mixtral"), "shared", RANK), tmp_path, experts=layout)
    model = copy.deepcopy(base("mixtral"))
    before = Snapshot(model)
    said = r"stacked experts as well .*merge_and_unload instead\.$"
    with pytest.raises(ValueError, match=said if layout == "peft" else "experts"):
        rasa_ext.import_lora(model, tmp_path)
    before.assert_unchanged()


@pytest.mark.parametrize(("family", "beside"), [("mixtral", False), ("deepseek_v3", True)])
def test_import_lora_of_linear_layers(family, beside, tmp_path):
    """Also where some stand in target_parameters."""
    plain = base(family, beside=beside)
    model = rasa_ext.patch_model(copy.deepcopy(plain), RANK, 1)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.normal_(std=0.3)
    rasa_ext.export_lora(model, tmp_path)
    found = copy.deepcopy(plain)
    rasa_ext.import_lora(found, tmp_path)
    assert not banks(found)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)
