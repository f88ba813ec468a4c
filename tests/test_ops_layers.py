"""The operators over all layers of a group at once."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from common import opcheck
from oracle import Adapter

from rasa_ext import ops

NAMES = ("pack_group", "pack_group_backward", "delta_group", "merge_group")
# (layers, in, out, private ranks, pool ranks)
SHAPES = ((3, 9, 7, 3, 6), (1, 17, 2, 0, 5), (2, 6, 4, 2, None))


def group(shape, device, dtype=torch.float32) -> list[Adapter]:
    """Adapters of one group, which share their pool."""
    layers, width, out, own, pooled = shape

    def draw(*size):
        return torch.randn(*size, dtype=dtype, device=device)

    pools = (None, None) if pooled is None else (draw(pooled, width), draw(out, pooled))
    rank = own + (pooled or 0)
    return [
        Adapter(draw(own, width), pools[0], draw(out, own), pools[1], draw(rank))
        for _ in range(layers)
    ]


def forward_args(adapters) -> tuple:
    first = adapters[0]
    A, B, d = ([getattr(each, field) for each in adapters] for field in ("A", "B", "d"))
    return A, first.A_pool, B, first.B_pool, d


def backward_args(adapters, dAp, dBt) -> tuple:
    _, _, B, B_pool, d = forward_args(adapters)
    return dAp, dBt, B, B_pool, d


def sample_calls(device):
    for shape, multiple in itertools.product(SHAPES, (1, 4)):
        adapters = group(shape, device)
        Ap, Bt = ops.pack_group(*forward_args(adapters), torch.float32, multiple)
        weights = [torch.randn(shape[2], shape[1], device=device) for _ in adapters]
        yield "pack_group", (*forward_args(adapters), torch.bfloat16, multiple)
        yield "pack_group_backward", backward_args(adapters, torch.randn_like(Ap), Bt)
        yield "delta_group", (Ap, Bt)
        yield "merge_group", (weights, Ap, Bt, -1.0)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    operator = getattr(torch.ops.rasa_ext, name).default
    calls = [args for called, args in sample_calls(device) if called == name]
    assert calls
    for args in calls:
        opcheck(operator, args)


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_are_those_of_single_layers(shape, dtype, multiple, device):
    adapters = group(shape, device)
    Ap, Bt = ops.pack_group(*forward_args(adapters), dtype, multiple)
    assert Ap.shape[0] == Bt.shape[0] == shape[0]
    for index, each in enumerate(adapters):
        args = (each.A, each.A_pool, each.B, each.B_pool, each.d)
        for got, expected in zip((Ap, Bt), ops.pack(*args, dtype, multiple), strict=True):
            assert torch.equal(got[index], expected)


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pool_gradients_sum_over_layers(shape, multiple, device):
    """From dL/dW = S of every layer: dAp = Bt^T S, dBt = S Ap^T."""
    adapters = group(shape, device, torch.float64)
    Ap, Bt = ops.pack_group(*forward_args(adapters), torch.float64, multiple)
    S = torch.randn(shape[0], shape[2], shape[1], dtype=torch.float64, device=device)
    dAp, dBt = Bt.transpose(1, 2) @ S, S @ Ap.transpose(1, 2)
    dA, dA_pool, dB, dB_pool, dd = ops.pack_group_backward(*backward_args(adapters, dAp, dBt))
    expected = [oracle.adapter_grads(s, each) for s, each in zip(S, adapters, strict=True)]
    for index, each in enumerate(expected):
        torch.testing.assert_close(dA[index], each["A"])
        torch.testing.assert_close(dB[index], each["B"])
        torch.testing.assert_close(dd[index], each["d"])
    torch.testing.assert_close(dA_pool, sum(each["A_pool"] for each in expected))
    torch.testing.assert_close(dB_pool, sum(each["B_pool"] for each in expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta(shape, dtype, device):
    """In the accumulation dtype, whatever the pack's."""
    adapters = group(shape, device, torch.float64)
    Ap, Bt = ops.pack_group(*forward_args(adapters), dtype)
    found = ops.delta_group(Ap, Bt)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    eps = torch.finfo(wide).eps
    expected = Bt.double() @ Ap.double()
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps)
    if dtype == torch.float64:
        for got, each in zip(found, adapters, strict=True):
            torch.testing.assert_close(got, oracle.delta(each))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge(dtype, transposed, sign, device):
    """In place, summed wide and rounded once, into weights of either layout."""
    adapters = group(SHAPES[0], device)
    Ap, Bt = ops.pack_group(*forward_args(adapters), torch.float32)
    weights = [torch.randn(7, 9, device=device).to(dtype) for _ in adapters]
    if transposed:
        weights = [weight.T.contiguous().T for weight in weights]
    before = [weight.clone() for weight in weights]
    assert ops.merge_group(weights, Ap, Bt, sign) is None
    rounding = max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps)
    for weight, old, each in zip(weights, before, adapters, strict=True):
        expected = old.double() + sign * oracle.delta(each)
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.double(), expected, rtol=1.01 * rounding, atol=2e-6)
