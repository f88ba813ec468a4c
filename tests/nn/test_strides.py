"""Results do not change with other strides of parameters, which are contiguous at first."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
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


def test_parameters_as_one_vector():
    """LBFGS makes vectors of parameters and gradients, too."""
    base, inputs = SEQUENTIAL.build(), SEQUENTIAL.inputs(0)
    model = patched(base)
    parameters = rasa_ext.adapter_parameters(model)
    vector = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(vector * 0.5, parameters)
    assert torch.equal(nn.utils.parameters_to_vector(parameters), vector * 0.5)
    optimizer = torch.optim.LBFGS(parameters, lr=0.01)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = SEQUENTIAL.loss(model, inputs)[1]
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert SEQUENTIAL.loss(model, inputs)[1] < before
    check_step(SEQUENTIAL, base, model)


@pytest.mark.parametrize("view", [False, True])
def test_buckets_of_ddp(view, group_of_one):
    """DDP does not warn of gradients whose strides do not match the buckets'."""
    model, inputs = patched(SEQUENTIAL.build()), SEQUENTIAL.inputs(0)
    with warnings.catch_warnings(action="error"):
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        for _ in range(2):
            SEQUENTIAL.loss(wrapped, inputs)[1].backward()
    assert all(p.grad.is_contiguous() for p in rasa_ext.adapter_parameters(model))
