"""Whole models on the device: checkpointing, projections computed together, merging."""

from unittest import mock

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext.nn import functional
from tests.gpu.steps import check_model
from tests.helpers.adapters import adapted_layers, adapters, check_step, observe, patched
from tests.helpers.models import BERT, GPT2, LLAMA, T5, Entry, ids
from tests.helpers.operators import P

DTYPES = [torch.float32, torch.bfloat16]


def step(entry: Entry, model: nn.Module, device: str, seed: int = 0) -> dict:
    """Return logits and gradients, with dropout masks of ``seed``."""
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return observe(model, adapters(model), entry, entry.inputs(0, dtype, device))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("entry", [LLAMA, GPT2, T5], ids=ids)
def test_checkpointing(entry, dropout, use_reentrant, device, fused):
    """Checkpointing gives the same gradients, also with dropout under the same seed."""
    base = entry.build().to(device, torch.float64)
    model = patched(base, dropout=dropout, adapter_dtype=torch.float64).train()
    expected = step(entry, model, device)
    other = step(entry, model, device, seed=1)
    assert torch.equal(other["logits"], expected["logits"]) == (dropout == 0)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(step(entry, model, device), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("entry", [LLAMA, BERT], ids=ids)
def test_projections_computed_together(entry, dtype, device, fused, monkeypatch):
    """Projections are as exact as plain PyTorch, computed together or separately."""
    together = mock.Mock(wraps=functional.adapted_projections)
    monkeypatch.setattr(functional, "adapted_projections", together)
    base = entry.build().to(device, dtype)
    check_model(entry, base, patched(base).train(), draws=4)
    calls = [len(weights) for _, weights, *_ in (call.args for call in together.call_args_list)]
    assert calls == ([3, 2] * 3 if entry is LLAMA else [3] * 2) * 4 * fused


def test_a_model_that_is_moved_after_patching_and_back(device):
    """Pools stay shared when a patched model moves to a device and back."""
    base = LLAMA.build()
    model = patched(base).to(device)
    pools = {id(layer.pool) for layer in adapted_layers(model).values()}
    assert len(pools) == len(adapted_layers(model)) // 3
    assert {p.device.type for p in rasa_ext.adapter_parameters(model)} == {device}
    check_model(LLAMA, base.to(device), model)
    check_step(LLAMA, base.cpu(), model.cpu())
