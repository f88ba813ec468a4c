"""An adapted linear's two calls on the host code: to the bit what the operators they join give."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.operators import draw_adapter, forward_of, opcheck, random_mask

NEEDS = list(itertools.product((True, False), repeat=3))


def draw(tokens, pooled, dtype):
    sizes = ((tokens, 9), (7, 9), (7,), (tokens, 7))
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return *tensors, draw_adapter(9, 7, 3, pooled, dtype=wide)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("pooled", [6, None])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_values(host, dtype, pooled, dropout):
    for tokens, need, added in itertools.product((0, 5, 33), NEEDS, (False, True)):
        x, weight, bias, grad, adapter = draw(tokens, pooled, dtype)
        mask = (random_mask(x), 1.25) if dropout else ()
        dropped = forward_of(x, mask)
        y, base = (grad, (None, None)) if added else (None, (weight, bias))
        out, U = host.ops.adapted_linear(y, x, *base, *adapter, 16, *dropped)
        Ap, up = host.ops.pack(*adapter, x.dtype, 16)
        plain = host.ops.low_rank_add if added else host.ops.low_rank_linear
        first = plain(*((grad, x) if added else (x, *base)), Ap, up, *dropped)
        assert all(map(torch.equal, (out, U), first))

        given = x if need[1] else None, base[0], U if need[2] else None
        dx, dAp, dBp = host.ops.low_rank_linear_backward(grad, *given, Ap, up, *need, *mask)
        downs, ups = dAp if need[1] else None, dBp if need[2] else None
        expected = dx, *host.ops.pack_backward(downs, ups, *adapter[2:])
        found = host.ops.adapted_linear_backward(grad, *given, *adapter, 16, *need, *mask)
        assert all(map(torch.equal, found, expected))


def test_opcheck(host):
    for pooled, need in itertools.product((6, None), NEEDS):
        x, weight, bias, grad, adapter = draw(5, pooled, torch.float32)
        opcheck(host.ops.adapted_linear.default, (None, x, weight, bias, *adapter, 8))
        _, U = host.ops.adapted_linear(None, x, weight, bias, *adapter, 8)
        given = x if need[1] else None, weight, U if need[2] else None
        opcheck(host.ops.adapted_linear_backward.default, (grad, *given, *adapter, 8, *need))


def test_a_base_or_its_output(host):
    x, weight, _, grad, adapter = draw(5, 6, torch.float32)
    with pytest.raises(RuntimeError, match=r"weight: expected a tensor, or y.* got both"):
        host.ops.adapted_linear(grad, x, weight, None, *adapter)
    with pytest.raises(RuntimeError, match=r"weight: expected a tensor, or y.* got None for both"):
        host.ops.adapted_linear(None, x, None, None, *adapter)
