"""The operators over the packs of all layers of a group."""

from __future__ import annotations

import itertools

import pytest
import torch

from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.operators import DTYPES, check_operator, draw_group, lists

# (layers, in, out, rank)
SHAPES = ((3, 9, 7, 9), (1, 17, 2, 5), (2, 6, 4, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators(shape, device):
    """Over packs, with tokens and without, and what is needed in every combination."""
    layers, width, out, rank = shape

    def draw(*size):
        return torch.randn(*size, device=device)

    weights = [draw(out, width) for _ in range(layers)]
    packs = draw(layers, rank, width), draw(layers, rank, out)
    check_operator("delta_group", *packs)
    check_operator("merge_group", weights, *packs)
    for tokens in (5, 0):
        x, grad = draw(layers, tokens, width), draw(layers, tokens, out)
        bias = draw(layers, out) if tokens else None
        check_operator("linear_group", x, weights, bias, *packs)
        _, U = ops.linear_group(x, weights, bias, *packs)
        for need in itertools.product((True, False), repeat=2):
            check_operator("linear_group_backward", grad, x, weights, U, *packs, *need)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_in_the_accumulation_dtype(shape, dtype, device):
    layers, width, out, rank = shape
    Ap, Bp = (torch.randn(layers, rank, n, device=device).to(dtype) for n in (width, out))
    found = ops.delta_group(Ap, Bp)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    eps = torch.finfo(wide).eps
    expected = Bp.double().transpose(1, 2) @ Ap.double()
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_rounds_once_into_weights_of_either_layout(dtype, transposed, device):
    adapters = draw_group(3, 9, 7, 3, 6, device=device)
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
