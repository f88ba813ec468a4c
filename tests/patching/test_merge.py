"""merge, unmerge, merge_and_unload, unpatch and disable_adapter."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rasa_ext
from tests.helpers import oracle
from tests.helpers.adapters import RANK, adapted_layers, adapters, content, patched, same_bits
from tests.helpers.models import (
    BERT,
    EVERY,
    FAMILIES,
    GPT2,
    LLAMA,
    SEQUENTIAL,
    TIED,
    TWO_NAMES,
    ids,
    logits,
)
from tests.helpers.refusals import Snapshot, refused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, RANK])
@pytest.mark.parametrize("entry", [LLAMA, GPT2, SEQUENTIAL], ids=ids)
def test_merged_weights(entry, k, dtype, device):
    """W + dW is summed in float32 or wider and rounded once; merge returns max |dW|."""
    base = entry.build().to(device, dtype)
    model = patched(base, RANK, k)
    before = Snapshot(model)
    rasa_ext.unmerge(model)  # not merged, so no effect
    largest = rasa_ext.merge(model)
    assert isinstance(largest, float)
    changes = [oracle.delta(adapter).abs().max() for adapter in adapters(model).values()]
    assert largest == pytest.approx(max(changes).item(), rel=1e-5)
    assert rasa_ext.merge(model) == largest  # a second merge has no effect
    rounding = 1.01 * max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps)
    for name, adapter in adapters(model).items():
        module = base.get_submodule(name)
        expected = oracle.merged_weight(module, adapter)
        got = model.get_submodule(name).base_layer.weight
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=1e-6)
    rasa_ext.unmerge(model)
    before.assert_unchanged()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, 1e6])
@pytest.mark.parametrize("call", [rasa_ext.merge, rasa_ext.merge_and_unload])
@pytest.mark.parametrize("k", [0, 1])
def test_results_that_are_not_finite_are_refused(bad, call, k):
    """No layer is merged if the last one would not be finite; 1e6 overflows float16."""
    model = patched(LLAMA.build().half(), RANK, k)
    name = list(adapted_layers(model))[-1]
    with torch.no_grad():
        adapted_layers(model)[name].d[0] = bad
    refused(lambda: call(model), model, rf"finite.*{name}.*float16")
    assert not any(layer.merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize("entry", EVERY, ids=ids)
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_a_plain_model(entry, merged_before):
    base = entry.build()
    model = patched(base).eval()
    dense, free = oracle.dense_model(base, adapters(model)).state_dict(), logits(entry, model)
    if merged_before:
        rasa_ext.merge(model)
        torch.testing.assert_close(logits(entry, model), free, rtol=1e-4, atol=1e-5)
    assert rasa_ext.merge_and_unload(model) is model
    assert [(n, type(m)) for n, m in model.named_modules(remove_duplicate=False)] == [
        (n, type(m)) for n, m in base.named_modules(remove_duplicate=False)
    ]
    state = {key: value.double() for key, value in model.state_dict().items()}
    assert state.keys() == base.state_dict().keys()
    torch.testing.assert_close(state, dense, rtol=1e-6, atol=1e-6, check_dtype=False)
    rasa_ext.patch_model(model, 2, 1)


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
@pytest.mark.parametrize("merged", [False, True])
def test_unpatch_restores_everything(entry, merged):
    model = entry.build()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 1)
    before = Snapshot(model)
    assert rasa_ext.patch_model(model, RANK, 1) is model
    for parameter in rasa_ext.adapter_parameters(model):
        nn.init.normal_(parameter)
    if merged:
        rasa_ext.merge(model)
    assert rasa_ext.unpatch(model) is model
    before.assert_unchanged()


def test_unpatch_keeps_what_modules_to_save_learned():
    model = BERT.build()
    model.classifier.weight.requires_grad_(False)
    rasa_ext.patch_model(model, RANK, 1, modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.weight.fill_(7)
    rasa_ext.unpatch(model)
    assert (model.classifier.weight == 7).all()
    assert not model.classifier.weight.requires_grad
    assert model.classifier.bias.requires_grad


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_disable_adapter(entry, merged):
    base = entry.build().eval().requires_grad_(False)  # torch's matmul depends on that flag
    model = patched(base).eval()
    if merged:
        rasa_ext.merge(model)
    adapted = logits(entry, model)
    with rasa_ext.disable_adapter(model):
        assert torch.equal(logits(entry, model), logits(entry, base))
    assert torch.equal(logits(entry, model), adapted)
    with pytest.raises(KeyError), rasa_ext.disable_adapter(model):
        raise KeyError
    assert torch.equal(logits(entry, model), adapted)
    assert all(layer.merged == merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize("merged", [False, True])
def test_contexts_that_overlap(merged):
    """The adapter is off until the last overlapping context ends, and then on again."""
    base = LLAMA.build().eval().requires_grad_(False)
    model = patched(base).eval()
    if merged:
        rasa_ext.merge(model)
    adapted, alone = logits(LLAMA, model), logits(LLAMA, base)
    first, second = rasa_ext.disable_adapter(model), rasa_ext.disable_adapter(model)
    first.__enter__()
    second.__enter__()
    assert torch.equal(logits(LLAMA, model), alone)
    first.__exit__(None, None, None)
    assert torch.equal(logits(LLAMA, model), alone)
    with pytest.raises(RuntimeError, match=r"model: leave rasa_ext\.disable_adapter"):
        rasa_ext.merge(model)
    second.__exit__(None, None, None)
    assert torch.equal(logits(LLAMA, model), adapted)
    assert all(layer.merged == merged for layer in adapted_layers(model).values())


@pytest.mark.parametrize("entry", [LLAMA, GPT2, TWO_NAMES], ids=ids)
def test_autocast_does_not_reach_a_merge(entry):
    """dW (out, in) and merged weights are computed in float32 under autocast, too."""
    model, inside = (patched(entry.build()) for _ in range(2))
    expected = dict(rasa_ext.delta_weights(model))
    exact = {name: oracle.delta(adapter).float() for name, adapter in adapters(model).items()}
    torch.testing.assert_close(expected, exact, rtol=1e-5, atol=1e-6)
    rasa_ext.merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        deltas = dict(rasa_ext.delta_weights(inside))
        rasa_ext.merge(inside)
    torch.testing.assert_close(deltas, expected, rtol=0, atol=0)
    assert not any(delta.requires_grad for delta in deltas.values())
    assert all(map(same_bits, inside.state_dict().values(), model.state_dict().values()))


def test_a_tied_weight_is_not_merged():
    """A merge must not change an embedding that shares the head's weight."""
    model = patched(TIED.build(), RANK, 1, target_modules=["readout"])
    refused(lambda: rasa_ext.merge(model), model, "readout.*shared with.*embed")


MADE_ANEW = {
    "weight_norm, by hooks": torch.nn.utils.weight_norm,
    "spectral_norm, by hooks": torch.nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.parametrize("kind", MADE_ANEW)
def test_a_weight_that_is_made_of_others_takes_no_merge(kind):
    """A layer with a recomputed weight can train, but a merge would be lost in the next forward."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    MADE_ANEW[kind](model[2])
    x = torch.randn(3, 6)
    expected = model.eval()(x).detach()
    rasa_ext.patch_model(model, 2, 0)
    assert same_bits(model(x).detach(), expected)
    for parameter in rasa_ext.adapter_parameters(model):
        nn.init.normal_(parameter)
    adapted = model(x).detach()
    assert not torch.equal(adapted, expected)
    for call in (rasa_ext.merge, rasa_ext.merge_and_unload):
        said = r"the weight of '2' is computed from other tensors \(.*weight.*\), so a m"
        with pytest.raises(ValueError, match=said):
            call(model)
        assert same_bits(model(x).detach(), adapted)


def test_an_adapter_that_changes_while_merged_is_not_used(tmp_path):
    """The model would compute with the old one, and a file hold the new one."""
    model = patched(LLAMA.build(), trainable_token_indices=[3])
    state = copy.deepcopy(model.state_dict())
    rasa_ext.merge(model)
    model.load_state_dict(model.state_dict())  # equal values
    rasa_ext.save_adapter(model, tmp_path / "equal")
    calls = (
        lambda: rasa_ext.save_adapter(model, tmp_path / "new"),
        lambda: model.save_pretrained(tmp_path / "new"),
        lambda: rasa_ext.export_lora(model, tmp_path / "new", allow_dropped=True),
        lambda: rasa_ext.merge(model),
        lambda: rasa_ext.merge_and_unload(model),
    )
    for name in ("model.layers.1.mlp.up_proj.B", "model.embed_tokens.rows"):
        said = rf"model: .*{re.escape(name)}.*rasa_ext\.unmerge"
        model.load_state_dict({name: state[name] + 1}, strict=False)
        for call in calls:
            refused(call, model, said, kind=RuntimeError)
        model.load_state_dict({name: state[name]}, strict=False)
    assert not (tmp_path / "new").exists()
    rasa_ext.save_adapter(model, tmp_path / "old")
    assert content(tmp_path / "old") == content(tmp_path / "equal")
    model.load_state_dict({name: state[name] + 1}, strict=False)
    rasa_ext.unmerge(model)
    rasa_ext.save_adapter(model, tmp_path / "new")
