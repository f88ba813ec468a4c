"""Several adapters on one model: adding, switching, deleting, disabling, merging."""

import copy
from collections import OrderedDict

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.peft import RasaConfig
from tests.helpers import models, oracle
from tests.helpers.adapters import patched, same_adapters, same_bits
from tests.helpers.models import EVERY, GPT2
from tests.helpers.peft import TOKENS, adapted, changes, trained
from tests.helpers.peft_sides import FAMILIES, LINEAR, sides
from tests.helpers.refusals import Snapshot, refused
from tests.helpers.tiny_lm import make_model


@pytest.mark.parametrize("order", [1, -1])
@sides("mixtral")
def test_several_at_once_add_up_and_are_all_trained(side, order):
    model = side.two()
    names = [*model.peft_config][:2] if order == 1 else [*model.peft_config][::-1]
    model.base_model.set_adapter(names)
    expected = side.dense(model, *names)
    side.close(side.logits(model), expected)
    logits = model(side.tokens).logits
    side.close(logits, expected)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(model).values())
    assert {name.rpartition(".")[2] for name in trained(model)} == set(names)


@sides("mixtral")
def test_deleting(side):
    model = side.two()
    expected = side.dense(model, "second")
    adapted = [owner for owner in model.base_model.owners() if "second" in owner.configs]
    for name in {*model.peft_config} - {"second"}:
        model.delete_adapter(name)
    assert list(model.peft_config) == ["second"]
    assert all(key.endswith(".second") for key in model.state_dict() if ".rasa_" in key)
    model.set_adapter("second")
    side.close(model(side.tokens).logits, expected)
    assert [owner for owner in model.base_model.owners() if owner.configs] == adapted
    with pytest.raises(ValueError, match="default"):
        model.delete_adapter("default")


@sides("mixtral")
def test_disabling(side):
    model, base = side.two(), side.logits(side.base())
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(side.logits(model), base)
            assert not trained(model)
        side.close(side.logits(model), side.dense(model, "default"))
    assert trained(model)


@sides("mixtral")
def test_a_failed_addition_leaves_the_model(side):
    """Experts that were wrapped for the new adapter are unwrapped again."""
    model = side.one(rasa_experts=None, target_modules=["q_proj"])
    experts = "rasa_experts" in side.options
    config = RasaConfig(
        rasa_experts="slot" if experts else None,
        target_modules=[side.up],
        rank_pattern={"w_q": 2},
    )
    refused(lambda: model.add_adapter("second", config), model, "w_q")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", EVERY, ids=models.ids)
def test_a_merged_model_is_that_of_patch_model(entry, dtype):
    """Results are bit-identical: both front ends share one implementation."""
    base = entry.build().to(dtype)
    found, expected = adapted(base).merge_and_unload(), rasa_ext.merge_and_unload(patched(base))
    kinds = [[type(module) for module in each.modules()] for each in (found, expected)]
    assert kinds[0] == kinds[1]
    assert same_adapters(found, expected)


@sides("mixtral", "gpt_oss")
def test_merging_and_back_is_exact(side):
    model = side.two()
    before, logits = copy.deepcopy(model.state_dict()), side.logits(model)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    side.close(side.logits(model), side.dense(model, "default"))
    with pytest.warns(UserWarning, match="already merged|additionally merging"):
        model.merge_adapter(["second"])
    side.close(side.logits(model), side.dense(model, "default", "second"))
    model.unmerge_adapter()
    assert not any(owner.merged for owner in model.base_model.owners())
    assert all(same_bits(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(side.logits(model), logits)
    several = [*model.peft_config][:0:-1]
    model.base_model.set_adapter(several)
    model.merge_adapter()
    side.close(side.logits(model), side.dense(model, *several))
    model.unmerge_adapter()
    both = ["default", "second"]
    expected = side.dense(model, *both)
    merged = model.merge_and_unload(safe_merge=True, adapter_names=both)
    side.close(side.logits(merged), expected)


def test_unload_gives_the_base_back():
    base = make_model().requires_grad_(False)
    before = Snapshot(base)
    assert get_peft_model(base, RasaConfig(r=2)).unload() is base
    before.assert_unchanged()


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@sides("mixtral")
def test_safe_merge_looks_before_it_merges(side, call):
    """If one layer cannot be merged, here the last, none is."""
    model = side.one().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    owners = model.base_model.owners()
    with torch.no_grad():
        owners[-1].rasa_d["default"][-1] = torch.inf
    words = r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    said = f"^safe_merge: {words}: .* '{owners[-1].specs['default'].name}"
    with pytest.raises(ValueError, match=said):
        getattr(model, call)(safe_merge=True)
    with pytest.raises(ValueError, match=said):
        owners[-1].merge(safe_merge=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bits(after[k], before[k]) for k in before if not k.endswith("rasa_d.default"))
    assert not any(owner.merged for owner in owners)


@pytest.mark.parametrize("safe", [False, True])
@sides("mixtral")
def test_a_second_merge_that_fails_leaves_the_first(side, safe, monkeypatch):
    model = side.two()
    model.merge_adapter()
    owner = next(each for each in model.base_model.owners() if "second" in each.configs)
    direct = ops.merge_group

    def failing(*args):
        monkeypatch.setattr(ops, "merge_group", direct)
        direct(*args)
        raise MemoryError

    monkeypatch.setattr(ops, "merge_group", failing)
    with pytest.warns(UserWarning, match="additionally merging"):
        refused(lambda: owner.merge(safe, ["second"]), model, kind=MemoryError)
    assert owner.merged_adapters == ["default"]
    model.unmerge_adapter()
    side.close(model(side.tokens).logits, side.dense(model, "default"))


def made_of_others() -> nn.Module:
    base = nn.Sequential(OrderedDict(up=nn.Linear(6, 6), down=nn.Linear(6, 6)))
    torch.nn.utils.parametrizations.weight_norm(base.down)
    return base


UNFIT = [
    (made_of_others, ["up", "down"], "weight of 'down' is computed from other tensors"),
    (models.TIED.build, ["readout"], "'readout' is shared with .*embed"),
]


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(("build", "names", "said"), UNFIT)
def test_weights_that_take_no_merge(build, names, said, call):
    """Layers before the failing one, and an embedding that shares a weight, stay unchanged."""
    model = adapted(build(), target_modules=names)
    refused(getattr(model, call), model, said)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_an_offloaded_base_takes_a_merge(call):
    """PEFT brings one weight after the other back to merge into it."""
    base = make_model()
    with torch.no_grad():
        expected = adapted(base).eval()(TOKENS).logits
        model = adapted(cpu_offload(base, torch.device("cpu"))).eval()
        merged = getattr(model, call)() or model
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@sides(*FAMILIES)
def test_delta_weight_is_the_oracles(side):
    others = [adapted(GPT2.build())] if side is LINEAR else []
    for owner in (each for model in (side.one(), *others) for each in model.base_model.owners()):
        base, exact = owner.get_base_layer(), changes(owner)
        turned = oracle.is_transposed(base) or getattr(base, "is_transposed", False)
        delta = owner.get_delta_weight("default")
        assert delta.shape == owner.weight.shape
        torch.testing.assert_close(delta.double(), exact.mT if turned else exact, rtol=0, atol=1e-6)
