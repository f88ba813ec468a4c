"""Linears of n layers that read one x, and their backward."""

from __future__ import annotations

import pytest
import torch

from rasa_ext import ops
from tests.helpers.adapters import Errors, excesses
from tests.helpers.operators import (
    DTYPES,
    check_operator,
    floor,
    random_mask,
    unpacked,
)
from tests.ops import test_linear

# (tokens, in, ((out, Rp), ...)): grouped-query attention, no tokens, one layer, ranks that differ.
SHAPES = (
    (5, 9, ((7, 9), (2, 9), (2, 9))),
    (0, 6, ((4, 6), (3, 6))),
    (4, 5, ((3, 3),)),
    (33, 65, ((31, 39), (1, 9))),
)


def draw(shape, dtype, device):
    """x, weights, biases of which the last is none, Ap, Bp and grads."""
    M, width, layers = shape

    def random(*size):
        return torch.randn(*size, dtype=dtype, device=device)

    return (
        random(M, width),
        [random(out, width) for out, _ in layers],
        [random(out) for out, _ in layers[:-1]] + [random(0)],
        random(sum(rank for _, rank in layers), width),
        [random(rank, out) for out, rank in layers],
        [random(M, out) for out, _ in layers],
    )


def formulas(x, weights, biases, Ap, Bp, grads, kept=None):
    """Those of each layer alone, and the sum of their gradients of x."""
    downs, found = Ap.split([len(up) for up in Bp]), {"dx": 0}
    for i, (weight, down, up, grad) in enumerate(zip(weights, downs, Bp, grads, strict=True)):
        bias = biases[i] if biases and biases[i].numel() else None
        one = test_linear.formulas(x, weight, bias, down, up, grad, kept)
        found |= {f"{name}{i}": one[name] for name in ("y", "U", "dAp", "dBp")}
        found["dx"] = found["dx"] + one["dx"]
    return found


def operators(x, weights, biases, Ap, Bp, grads, *mask):
    y, U = ops.linear_projections(x, weights, biases, Ap, Bp, *mask)
    dx, dAp, dBp = ops.linear_projections_backward(
        grads, x, weights, U, Ap, Bp, True, True, True, *mask
    )
    ranks = [len(up) for up in Bp]
    found = {"dx": dx}
    for i, parts in enumerate(zip(y, U.split(ranks, 1), dAp.split(ranks), dBp, strict=True)):
        found |= dict(zip((f"y{i}", f"U{i}", f"dAp{i}", f"dBp{i}"), parts, strict=True))
    return found


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, device):
    x, weights, biases, Ap, Bp, grads = draw(shape, torch.float32, device)
    for mask in ((), (random_mask(x), 1.25)):
        args = x, weights, [] if mask else biases, Ap, Bp, *mask
        check_operator("linear_projections", *args)
        for need in test_linear.NEEDS:
            inputs, U = x if need[1] else None, x @ Ap.T if need[2] else None
            args = grads, inputs, weights, U, Ap, Bp, *need, *mask
            check_operator("linear_projections_backward", *args)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, dropout, device):
    """Against float64, within twice the error of the same formula in plain PyTorch."""
    ours, theirs = Errors(), Errors()
    for turn in range(32):
        x, weights, biases, Ap, Bp, grads = draw(shape, dtype, device)
        tensors = [x, weights, biases if turn % 2 else [], Ap, Bp, grads]
        mask, kept = (), None
        if dropout:
            mask = random_mask(x), 1 / (1 - 0.25)
            kept = unpacked(mask[0], x.shape)
            x[~kept] *= 1e3  # what is dropped must not be seen
        found = operators(*tensors, *mask)
        wide = [[t.double() for t in v] if isinstance(v, list) else v.double() for v in tensors]
        reference = formulas(*wide, kept)
        ours.add(found, reference)
        theirs.add(formulas(*tensors, kept), reference)
    assert found["y0"].dtype == found["dx"].dtype == dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["dAp0"].dtype == found["dBp0"].dtype == accumulated
    assert not excesses(ours, theirs, floor(dtype))[0]


@pytest.mark.parametrize("dropout", [False, True])
def test_only_what_is_needed_is_read_and_comes_back(dropout, device):
    tensors = draw(SHAPES[0], torch.float64, device)
    x, weights, _, Ap, Bp, grads = tensors
    mask = (random_mask(x), 1 / (1 - 0.25)) if dropout else ()
    expected = operators(*tensors, *mask)
    U = torch.cat([expected[f"U{i}"] for i in range(3)], 1)
    for need_x, need_A, need_B in test_linear.NEEDS:
        dx, dAp, dBp = torch.ops.rasa_ext.linear_projections_backward(
            grads, x if need_A else None, weights, U if need_B else None, Ap, Bp,
            need_x, need_A, need_B, *mask,
        )  # fmt: skip
        assert torch.equal(dx, expected["dx"]) if need_x else not dx.numel()
        rows = torch.cat([expected[f"dAp{i}"] for i in range(3)])
        assert torch.equal(dAp, rows) if need_A else not dAp.numel()
        assert len(dBp) == (3 if need_B else 0)
        assert all(torch.equal(t, expected[f"dBp{i}"]) for i, t in enumerate(dBp))
