"""Whole models: checkpointing, projections computed together, merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext.nn import functional
from tests.gpu.steps import check_evaluation, check_model
from tests.helpers import oracle
from tests.helpers.adapters import adapted_layers, adapters, check_step, observe, patched
from tests.helpers.models import BERT, GPT2, LLAMA, T5, Entry, ids
from tests.helpers.operators import P
from tests.helpers.refusals import Snapshot

DTYPES = [torch.float32, torch.bfloat16]


def step(entry: Entry, model: nn.Module, device: str, seed: int = 0) -> dict:
    """Logits and gradients, with the same masks under the same seed."""
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return observe(model, adapters(model), entry, entry.inputs(seed, dtype, device))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entry", [LLAMA, GPT2, T5], ids=ids)
def test_checkpointing_draws_the_same_masks_again(entry, use_reentrant, device, fused):
    base = entry.build().to(device, torch.float64)
    model = patched(base, dropout=P, adapter_dtype=torch.float64).train()
    expected = step(entry, model, device)
    other = step(entry, model, device, seed=1)
    assert not torch.allclose(other["logits"], expected["logits"])
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, value in step(entry, model, device).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpointing(dtype, use_reentrant, device, fused):
    base = LLAMA.build().to(device, dtype)
    model = patched(base).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    check_model(LLAMA, base, model)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("entry", [LLAMA, BERT], ids=ids)
def test_projections_computed_together(entry, dtype, device, fused, monkeypatch):
    """As exact as plain PyTorch either way, and so as each layer alone."""
    calls, direct = [], functional.adapted_projections

    def counting(x, weights, *args):
        calls.append(len(weights))
        return direct(x, weights, *args)

    monkeypatch.setattr(functional, "adapted_projections", counting)
    base = entry.build().to(device, dtype)
    check_model(entry, base, patched(base).train(), draws=4)
    assert calls == ([3, 2] * 3 if entry is LLAMA else [3] * 2) * 4 * fused


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("entry", [LLAMA, GPT2], ids=ids)
def test_merging(entry, k, dtype, device):
    """W + dW summed wide and rounded once; unmerged, every bit is what it was."""
    base = entry.build().to(device, dtype)
    model = patched(base, 4, k).eval()
    before = Snapshot(model)
    largest = rasa_ext.merge(model)
    changes = [oracle.delta(adapter).abs().max().item() for adapter in adapters(model).values()]
    assert largest == pytest.approx(max(changes), rel=1e-5)
    rounding = 1.01 * max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps)
    for name, adapter in adapters(model).items():
        expected = oracle.merged_weight(base.get_submodule(name), adapter)
        got = model.get_submodule(name).base_layer.weight
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=1e-6)
    rasa_ext.unmerge(model)
    before.assert_unchanged()


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_merged_model_computes_the_same(tokens, device):
    base = LLAMA.build().to(device)
    model = patched(base).eval()
    inputs = {"input_ids": LLAMA.inputs(0, device=device)["input_ids"][:, :tokens]}
    free = check_evaluation(LLAMA, base, model, inputs)
    rasa_ext.merge(model)
    check_evaluation(LLAMA, base, model, inputs)
    rasa_ext.unmerge(model)
    with torch.no_grad():
        assert torch.equal(LLAMA.call(model, **inputs), free)


def test_a_model_that_is_moved_after_patching_and_back(device):
    """Its pools stay shared."""
    base = LLAMA.build()
    model = patched(base).to(device)
    pools = {id(layer.pool) for layer in adapted_layers(model).values()}
    assert len(pools) == len(adapted_layers(model)) // 3
    assert {p.device.type for p in rasa_ext.adapter_parameters(model)} == {device}
    check_model(LLAMA, base.to(device), model)
    check_step(LLAMA, base.cpu(), model.cpu())
