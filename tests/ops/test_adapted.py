"""adapted_linear and its backward: to the bit what the operators that they join give."""

from __future__ import annotations

import itertools

import pytest
import torch

from rasa_ext import ops
from tests.helpers.operators import (
    DTYPES,
    check_operator,
    draw_adapter,
    forward_of,
    random_mask,
)
from tests.ops.test_linear import NEEDS


def draw(tokens, pooled, dtype, device, params=torch.float32):
    """x (M, 9), weight (7, 9), bias, grad and an adapter of 3 own ranks."""
    sizes = ((tokens, 9), (7, 9), (7,), (tokens, 7))
    tensors = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    return *tensors, draw_adapter(9, 7, 3, pooled, device, params)


def joined(x, weight, bias, grad, adapter, multiple, need, mask, y=None):
    """The same by one operator after the other."""
    Ap, Bp = ops.pack(*adapter, x.dtype, multiple)
    if y is None:
        out, U = ops.low_rank_linear(x, weight, bias, Ap, Bp, *forward_of(x, mask))
    else:
        out, U = ops.low_rank_add(y, x, Ap, Bp, *forward_of(x, mask))
    dx, dAp, dBp = ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, *need, *mask)
    downs, ups = dAp if need[1] else None, dBp if need[2] else None
    return out, U, dx, *ops.pack_backward(downs, ups, *adapter[2:])


def together(x, weight, bias, grad, adapter, multiple, need, mask, y=None):
    dropped = forward_of(x, mask)
    out, U = ops.adapted_linear(y, x, weight, bias, *adapter, multiple, *dropped)
    given = x if need[1] else None, weight, U if need[2] else None
    rest = (*adapter, multiple, *need, *mask)
    return out, U, *ops.adapted_linear_backward(grad, *given, *rest)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("pooled", [6, 0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, pooled, dropout, device):
    for tokens, multiple, need in ((5, 1, NEEDS[0]), (0, 16, NEEDS[0]), (33, 8, NEEDS[3])):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, weight, bias, grad, adapter = draw(tokens, pooled, dtype, device, wide)
        mask = (random_mask(x), 1.25) if dropout else ()
        args = adapter, multiple, need, mask
        for base, y in (((weight, bias), None), ((None, None), grad)):
            expected = joined(x, *base, grad, *args, y)
            found = together(x, *base, grad, *args, y)
            for mine, theirs in zip(found, expected, strict=True):
                assert mine.dtype == theirs.dtype
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_operators(device):
    for pooled, need in itertools.product((6, None), NEEDS):
        x, weight, bias, grad, adapter = draw(5, pooled, torch.float32, device)
        check_operator("adapted_linear", None, x, weight, bias, *adapter, 8)
        dropped = forward_of(x, (random_mask(x), 1.25))
        check_operator("adapted_linear", grad, x, None, None, *adapter, 8, *dropped)
        _, U = ops.adapted_linear(None, x, weight, bias, *adapter, 8)
        given = x if need[1] else None, weight, U if need[2] else None
        check_operator("adapted_linear_backward", grad, *given, *adapter, 8, *need)


@pytest.mark.parametrize("both", [True, False])
def test_a_base_or_its_output(both, device):
    x, weight, _, grad, adapter = draw(5, 6, torch.float32, device)
    given = (grad, x, weight, None) if both else (None, x, None, None)
    with pytest.raises((ValueError, RuntimeError), match="weight: expected a tensor, or y"):
        ops.adapted_linear(*given, *adapter)
