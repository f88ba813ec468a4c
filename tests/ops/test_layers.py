"""The operators over all layers of a group, which share a pool."""

from __future__ import annotations

import itertools

import pytest
import torch

from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.operators import DTYPES, check_operator, draw_adapter
from tests.helpers.oracle import Adapter

# (layers, in, out, private ranks, pool ranks)
SHAPES = ((3, 9, 7, 3, 6), (1, 17, 2, 0, 5), (2, 6, 4, 2, None))


def group(shape, device, dtype=torch.float32) -> list[Adapter]:
    layers, *sizes = shape
    drawn = [draw_adapter(*sizes, device, dtype) for _ in range(layers)]
    first = drawn[0]
    return [each._replace(A_pool=first.A_pool, B_pool=first.B_pool) for each in drawn]


def lists(adapters) -> tuple:
    """A, A_pool, B, B_pool, d as the operators take them."""
    A, _, B, _, d = map(list, zip(*adapters, strict=True))
    return A, adapters[0].A_pool, B, adapters[0].B_pool, d


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators(shape, device):
    adapters = group(shape, device)
    for multiple in (1, 4):
        Ap, Bp = ops.pack_group(*lists(adapters), torch.float32, multiple)
        weights = [torch.randn(shape[2], shape[1], device=device) for _ in adapters]
        check_operator("pack_group", *lists(adapters), torch.bfloat16, multiple)
        dAp, dBp = torch.randn_like(Ap), torch.randn_like(Bp)
        check_operator("pack_group_backward", dAp, dBp, *lists(adapters)[2:])
        check_operator("delta_group", Ap, Bp)
        check_operator("merge_group", weights, Ap, Bp)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_operators(shape, device):
    """With a pool that all layers read, with none, and what is needed in every combination."""
    layers, width, out, own, pooled = shape

    def draw(*size):
        return torch.randn(*size, device=device)

    for tokens in (5, 0):
        x, grad = draw(layers, tokens, width), draw(layers, tokens, out)
        weights = [draw(out, width) for _ in range(layers)]
        pack = draw(layers, own, width), draw(layers, own, out)
        pool = (None,) * 3
        if pooled is not None:
            pool = draw(pooled, width), draw(pooled, out), draw(layers, pooled)
        bias = draw(layers, out) if tokens else None
        check_operator("linear_group", x, weights, bias, *pack, *pool)
        _, U, V = ops.linear_group(x, weights, bias, *pack, *pool)
        for need in itertools.product((True, False), repeat=2):
            check_operator("linear_group_backward", grad, x, weights, U, V, *pack, *pool, *need)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_are_those_of_single_layers(shape, device):
    adapters = group(shape, device)
    for dtype, multiple in itertools.product((torch.float32, torch.bfloat16), (1, 16)):
        Ap, Bp = ops.pack_group(*lists(adapters), dtype, multiple)
        assert len(Ap) == len(Bp) == shape[0]
        for down, up, each in zip(Ap, Bp, adapters, strict=True):
            single = ops.pack(*each, dtype, multiple)
            assert torch.equal(down, single[0])
            assert torch.equal(up, single[1])


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pool_gradients_sum_over_layers(shape, multiple, device):
    """From dL/dW = S of every layer: dAp = Bp S, dBp = Ap S^T."""
    adapters = group(shape, device, torch.float64)
    Ap, Bp = ops.pack_group(*lists(adapters), torch.float64, multiple)
    S = torch.randn(shape[0], shape[2], shape[1], dtype=torch.float64, device=device)
    dAp, dBp = Bp @ S, Ap @ S.transpose(1, 2)
    dA, dA_pool, dB, dB_pool, dd = ops.pack_group_backward(dAp, dBp, *lists(adapters)[2:])
    expected = [oracle.adapter_grads(s, each) for s, each in zip(S, adapters, strict=True)]
    for index, each in enumerate(expected):
        torch.testing.assert_close(dA[index], each["A"])
        torch.testing.assert_close(dB[index], each["B"])
        torch.testing.assert_close(dd[index], each["d"])
        assert dB[index].t().is_contiguous()
    torch.testing.assert_close(dA_pool, sum(each["A_pool"] for each in expected))
    torch.testing.assert_close(dB_pool, sum(each["B_pool"] for each in expected))
    assert dB_pool.t().is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_in_the_accumulation_dtype(shape, dtype, device):
    adapters = group(shape, device, torch.float64)
    Ap, Bp = ops.pack_group(*lists(adapters), dtype)
    found = ops.delta_group(Ap, Bp)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    eps = torch.finfo(wide).eps
    expected = Bp.double().transpose(1, 2) @ Ap.double()
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps)
    if dtype == torch.float64:
        for got, each in zip(found, adapters, strict=True):
            torch.testing.assert_close(got, oracle.delta(each))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_rounds_once_into_weights_of_either_layout(dtype, transposed, device):
    adapters = group(SHAPES[0], device)
    Ap, Bp = ops.pack_group(*lists(adapters), torch.float32)
    weights = [torch.randn(7, 9, device=device).to(dtype) for _ in adapters]
    if transposed:
        weights = [weight.T.contiguous().T for weight in weights]
    before = [weight.clone() for weight in weights]
    assert ops.merge_group(weights, Ap, Bp) is None
    rounding = max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps)
    for weight, old, each in zip(weights, before, adapters, strict=True):
        expected = old.double() + oracle.delta(each)
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.double(), expected, rtol=1.01 * rounding, atol=2e-6)


def test_few_tokens_leave_the_pool_alone():
    assert not ops.pool_in_packs(tokens=64, pooled=32)
    assert ops.pool_in_packs(tokens=65, pooled=32)
