"""Several adapters over one model: adding, switching, deleting, disabling, merging."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rasa_ext.peft import RasaConfig
from tests.helpers import models, oracle
from tests.helpers.adapters import same_bits
from tests.helpers.models import EVERY, LLAMA
from tests.helpers.oracle import Adapter
from tests.helpers.peft import (
    TOKENS,
    adapted,
    close,
    dense,
    layers,
    named,
    plain,
    tiny,
    trained,
    two,
)
from tests.helpers.tiny_lm import make_model


def test_each_adapter_has_its_own_ranks_pool_and_layers():
    model = two()
    first, second = named(model, "default"), named(model, "second")
    assert len(first) == 14
    assert {n.rpartition(".")[2] for n in second} == {"q_proj", "down_proj"}
    for tensors, own, pooled in ((first, 3, 2), (second, 3, 6)):
        for adapter in tensors.values():
            assert (adapter.A.shape[0], adapter.A_pool.shape[0]) == (own, pooled)
    q = [name for name in second if name.endswith("q_proj")]
    assert second[q[0]].A_pool is second[q[1]].A_pool
    assert second[q[0]].A_pool is not first[q[0]].A_pool


def test_switching():
    model = two()
    close(model(TOKENS).logits, dense(model, "default"))
    model.set_adapter("second")
    close(model(TOKENS).logits, dense(model, "second"))
    assert all(".second" in name for name in trained(model))
    model.set_adapter("default")
    close(model(TOKENS).logits, dense(model, "default"))
    assert all(".default" in name for name in trained(model))
    with torch.no_grad():  # from the cached packs, too
        for name in ("second", "default", "second"):
            model.set_adapter(name)
            close(model(TOKENS).logits, dense(model, name))


def test_two_at_once_add_up_and_are_both_trained():
    model = two()
    model.base_model.set_adapter(["default", "second"])
    logits = model(TOKENS).logits
    close(logits, dense(model, "default", "second"))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(model).values())
    assert {name.rpartition(".")[2] for name in trained(model)} == {"default", "second"}


def test_deleting():
    model = two()
    expected = dense(model, "second")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert not [key for key in model.state_dict() if key.endswith(".default")]
    model.set_adapter("second")
    close(model(TOKENS).logits, expected)
    assert sum(bool(layer.configs) for layer in layers(model).values()) == 4
    with pytest.raises(ValueError, match="default"):
        model.delete_adapter("default")


def test_disabling():
    model, base = two(), make_model()(TOKENS).logits
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    close(model(TOKENS).logits, dense(model, "default"))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)


def test_a_failed_addition_leaves_the_model():
    model = tiny().eval()
    before = model(TOKENS).logits
    with pytest.raises(ValueError, match="embed_tokens"):
        model.add_adapter("second", RasaConfig(r=2, target_modules=["embed_tokens"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("entry", EVERY, ids=models.ids)
def test_merged_weights_are_the_oracles_rounded_once(entry, dtype):
    base = entry.build().to(dtype)
    model = adapted(base)
    found = named(model, "default")
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert not layers(merged)
    for name, adapter in found.items():
        module = base.get_submodule(name)
        weight = merged.get_submodule(name).weight
        exact = oracle.merged_weight(module, adapter)
        assert weight.dtype == dtype
        # Half a step of the dtype, and the error of a float32 sum of some dozen terms.
        bound = torch.finfo(dtype).eps * exact.abs() / 2 * 1.001 + 1e-6 * exact.abs().max()
        assert ((weight - exact).abs() <= bound).all()
    changed = {id(base.get_submodule(name).weight) for name in found}
    for key, parameter in base.named_parameters(remove_duplicate=False):
        assert id(parameter) in changed or same_bits(parameter, merged.get_parameter(key)), key


def test_merging_and_back_is_exact():
    model = two()
    weights = {n: m.base_layer.weight.clone() for n, m in layers(model).items()}
    model.merge_adapter()
    close(model(TOKENS).logits, dense(model, "default"))
    with pytest.warns(UserWarning, match="already merged|additionally merging"):
        model.merge_adapter(["second"])
    close(model(TOKENS).logits, dense(model, "default", "second"))
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        assert same_bits(layer.base_layer.weight.detach(), weights[name])
        assert not layer.merged
    close(model(TOKENS).logits, dense(model, "default"))


def test_merge_and_unload_of_a_chosen_adapter():
    model = two()
    expected = dense(model, "second")
    close(model.merge_and_unload(adapter_names=["second"])(TOKENS).logits, expected)


def test_unload_gives_the_base_back():
    base = make_model()
    model = get_peft_model(copy.deepcopy(base), RasaConfig(r=2)).unload()
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_looks_before_it_merges(call):
    """Nothing is merged when one layer, here the last, cannot be."""
    model = tiny().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.rasa_d["default"][0] = torch.inf
    with pytest.raises(ValueError, match=r"^safe_merge: expected finite merged weights"):
        getattr(model, call)(safe_merge=True)
    with pytest.raises(ValueError, match=r"^safe_merge"):
        last.merge(safe_merge=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bits(after[k], before[k]) for k in before if not k.endswith("rasa_d.default"))
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_is_made_of_others_takes_no_merge(call):
    """Nor do the layers before it."""
    base = nn.Sequential(OrderedDict(up=nn.Linear(6, 6), down=nn.Linear(6, 6)))
    torch.nn.utils.parametrizations.weight_norm(base.down)
    config = RasaConfig(r=2, rasa_k=0, target_modules=["up", "down"], init_weights=False)
    model = get_peft_model(base, config).eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(ValueError, match="weight of 'down' is made anew of other tensors"):
            getattr(model, call)()
        assert same_bits(model(x), expected)


def test_safe_merge_of_a_sound_adapter_is_a_merge():
    model = tiny().eval()
    expected = dense(model, "default")
    close(model.merge_and_unload(safe_merge=True)(TOKENS).logits, expected)


def test_delta_weight_is_the_oracles():
    for entry in (LLAMA, models.GPT2):
        model = adapted(entry.build())
        for name, layer in layers(plain(model)).items():
            exact = oracle.delta(Adapter(*layer.adapter("default").factors()))
            exact = exact.T if oracle.is_transposed(layer.base_layer) else exact
            delta = layer.get_delta_weight("default")
            assert delta.shape == layer.base_layer.weight.shape
            torch.testing.assert_close(delta.double(), exact, rtol=0, atol=1e-6, msg=name)


def test_fused_projections_that_lose_their_adapter():
    """q, k and v computed together, then an adapter of q alone, then none on k and v at all."""
    model = two().train()
    model.set_adapter("default")
    for _ in range(3):
        model(TOKENS).logits.sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1)  # as a step of an optimizer
    for names in (["second"], ["default"], ["second"]):
        model.set_adapter(names[0])
        for grad in (True, False, True):
            with torch.set_grad_enabled(grad):
                close(model(TOKENS).logits, dense(model, *names))
    model.delete_adapter("default")
    model.set_adapter("second")
    for _ in range(2):
        close(model(TOKENS).logits, dense(model, "second"))
