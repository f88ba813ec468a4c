"""Results do not change with other strides of parameters, which are contiguous at first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rasa_ext
from tests.helpers.adapters import adapted_layers, adapters, check_step, patched
from tests.helpers.models import LLAMA, SEQUENTIAL
from tests.helpers.operators import columns


def is_contiguous(model: nn.Module) -> bool:
    assert adapters(model)
    return all(map(torch.Tensor.is_contiguous, model.state_dict().values()))


def turned(model: nn.Module) -> nn.Module:
    """Store matrices by columns, as older versions stored B."""
    for parameter in rasa_ext.adapter_parameters(model):
        if parameter.dim() > 1:
            parameter.data = columns(parameter.data)
    return model


def flattened(model: nn.Module) -> nn.Module:
    """Make parameters pieces of one buffer, as under ZeRO."""
    parameters = rasa_ext.adapter_parameters(model)
    flat = torch.cat([torch.zeros(1), *(p.detach().reshape(-1) for p in parameters)])
    at = 1  # so that no piece is aligned
    for parameter in parameters:
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return model


def with_gaps(model: nn.Module) -> nn.Module:
    for parameter in rasa_ext.adapter_parameters(model):
        parameter.data = torch.stack([parameter.data] * 2, -1)[..., 0]
    return model


CHANGES = (turned, flattened, with_gaps)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("entry", [SEQUENTIAL, LLAMA], ids=lambda entry: entry.name)
def test_any_strides_train_alike_and_run_alike(entry, change):
    base = entry.build()
    model = patched(base)
    twin = change(copy.deepcopy(model))
    assert is_contiguous(model)
    assert is_contiguous(twin) == (change is flattened)
    check_step(entry, base, twin)
    inputs = entry.inputs(1)
    with torch.no_grad():
        assert torch.equal(entry.loss(model, inputs)[0], entry.loss(twin, inputs)[0])
    if change is not with_gaps:
        for t in rasa_ext.adapter_parameters(twin):
            assert min(t.shape) < 2 or t.grad.stride() == t.stride()


def test_pruning():
    """torch replaces B by a product that each forward computes."""
    model = patched(SEQUENTIAL.build())
    layer = next(iter(adapted_layers(model).values()))
    dense = layer.B.detach().clone()
    prune.l1_unstructured(layer, "B", 0.5)
    assert torch.equal(layer.adapter().factors().B, dense * layer.B_mask)
    assert (layer.B_mask == 0).sum() == dense.numel() // 2
