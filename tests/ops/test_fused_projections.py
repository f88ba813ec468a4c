"""linear_projections, for several layers that read one x, and the backward."""

import pytest
import torch
from torch.utils._pytree import tree_map

from rasa_ext import ops
from tests.helpers import projection_cases
from tests.helpers.linear_cases import NEEDS
from tests.helpers.operators import (
    DTYPES,
    check_errors,
    check_operator,
    check_values,
    columns,
    draw_mask,
    random_mask,
)
from tests.helpers.projection_cases import SHAPES, draw, formulas, operators


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, device):
    x, weights, biases, Ap, Bp, grads, U = draw(shape, torch.float32, device)
    for mask in ((), (random_mask(x), 1.25)):
        args = x, weights, [] if mask else biases, Ap, Bp, *mask
        check_operator("linear_projections", *args)
        for need in NEEDS:
            given = x if need[1] else None, weights, U if need[2] else None, Ap, Bp
            check_operator("linear_projections_backward", grads, *given, *need, *mask)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, dropout, device):
    """Every element is within a few roundings, and RMS errors are at most twice plain PyTorch's."""
    found = check_errors(projection_cases, shape, dtype, dropout, device, no_bias=[])
    assert found["y0"].dtype == found["dx"].dtype == dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["dAp0"].dtype == found["dBp0"].dtype == accumulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_by_columns(dtype, device):
    for shape in SHAPES:
        tensors = draw(shape, dtype, device)
        tensors = tree_map(lambda t: columns(t) if t.dim() > 1 else t, tensors)
        check_values(operators, formulas, tensors)


@pytest.mark.parametrize("dropout", [False, True])
def test_only_what_is_needed_is_read_and_comes_back(dropout, device):
    tensors = draw(SHAPES[0], torch.float32, device)
    x, weights, _, Ap, Bp, grads, U = tensors
    mask, _ = draw_mask(x, dropout)
    expected = operators(*tensors, *mask)
    for need_x, need_A, need_B in NEEDS:
        dx, dAp, dBp = ops.linear_projections_backward(
            grads, x if need_A else None, weights, U if need_B else None, Ap, Bp,
            need_x, need_A, need_B, *mask,
        )  # fmt: skip
        assert torch.equal(dx, expected["dx"]) if need_x else not dx.numel()
        rows = torch.cat([expected[f"dAp{i}"] for i in range(3)])
        assert torch.equal(dAp, rows) if need_A else not dAp.numel()
        assert len(dBp) == (3 if need_B else 0)
        assert all(torch.equal(t, expected[f"dBp{i}"]) for i, t in enumerate(dBp))
