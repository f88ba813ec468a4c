"""Quantized bases on the device, with bitsandbytes' kernels."""

import pytest
import torch
from torch import nn

import rasa_ext
from tests.helpers import oracle
from tests.helpers.adapters import adapter_of, excesses, patched

WHY = "bitsandbytes and torchao are not installed"
FORMS = ("nf4", "nf4 nested", "fp4", "int8")


@pytest.fixture
def quantized():
    """tests.helpers.quantized, which needs bitsandbytes and torchao."""
    for name in ("bitsandbytes", "torchao"):
        pytest.importorskip(name, reason=WHY)
    from tests.helpers import quantized

    return quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward(form, dtype, device, quantized):
    """y is base(x) + x dW^T, and dx is G W + H Ap with the dequantized W."""
    model = quantized.quantized(quantized.linears(dtype=dtype), form).to(device)
    base, layer = model[2], patched(model)[2].train()
    ours, theirs = quantized.layer_errors(base, layer, dtype, device)
    assert not excesses(ours, theirs, 0.0)[0]


@pytest.mark.parametrize("form", FORMS)
def test_merging(form, device, quantized):
    """Weights are dense while merged; unmerging restores the stored bytes."""
    model = patched(quantized.quantized(quantized.linears(), form).to(device)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = [quantized.numbers(layer.base_layer) for layer in model]
    rasa_ext.merge(model)
    for weight, layer in zip(dense, model, strict=True):
        expected = weight + oracle.delta(adapter_of(layer))
        got = layer.base_layer.weight
        assert type(got) is nn.Parameter
        error = (got.double() - expected).norm() / expected.norm()
        assert error <= torch.finfo(got.dtype).eps
    rasa_ext.unmerge(model)
    state = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
