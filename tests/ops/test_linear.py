"""low_rank_linear, low_rank_add and their backward."""

import itertools

import pytest
import torch

from rasa_ext import ops
from tests.helpers import linear_cases
from tests.helpers.linear_cases import EMPTY, NEEDS, draw, formulas, operators
from tests.helpers.operators import (
    DTYPES,
    LAYOUTS,
    check_errors,
    check_operator,
    check_values,
    draw_mask,
    one_number,
    one_row,
    random_mask,
)

# (tokens, in, out, Rp): odd sizes, no tokens, all sizes one. Up to 16 tokens have their own kernel.
SHAPES = (
    (5, 9, 7, 9),
    (3, 17, 2, 5),
    (0, 6, 4, 6),
    (8, 16, 24, 4),
    (1, 1, 1, 1),
    (33, 65, 31, 39),
    (17, 16, 24, 16),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, dtype, device):
    x, weight, bias, Ap, Bp, grad, U = draw(shape, dtype, device)
    for mask in ((), (random_mask(x), 1.25)):
        check_operator("low_rank_linear", x, weight, None if mask else bias, Ap, Bp, *mask)
        check_operator("low_rank_add", grad, x, Ap, Bp, *mask)
        for need in NEEDS:
            base, inputs = weight if mask else None, x if need[1] else None
            args = grad, base, U if need[2] else None, Ap, Bp
            check_operator("low_rank_linear_backward", args[0], inputs, *args[1:], *need, *mask)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, dropout, device):
    """Every element is within a few roundings, and RMS errors are at most twice plain PyTorch's."""
    found = check_errors(linear_cases, shape, dtype, dropout, device, no_bias=None)
    assert {found[key].dtype for key in ("y", "U", "dx", "added", "dx_add")} == {dtype}
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["dAp"].dtype == found["dBp"].dtype == accumulated


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_nothing(dtype, dropout, device):
    """Without features or ranks, the result is the remaining terms."""
    for tokens, sizes, biased in itertools.product((1, 18), EMPTY, (True, False)):
        tensors = draw((tokens, *sizes), dtype, device)
        if not biased:
            tensors[2] = None
        check_values(operators, formulas, tensors, *draw_mask(tensors[0], dropout))


@pytest.mark.parametrize("dropout", [False, True])
def test_only_what_is_needed_is_read_and_comes_back(dropout, device):
    """x is read only for dAp, U only for dBp; gradients that are not needed are empty."""
    tensors = draw(SHAPES[0], torch.float32, device)
    x, weight, _, Ap, Bp, grad, U = tensors
    mask, _ = draw_mask(x, dropout)
    expected = operators(*tensors, *mask)
    for need_x, need_A, need_B in NEEDS:
        found = ops.low_rank_linear_backward(
            grad, x if need_A else None, weight, U if need_B else None, Ap, Bp,
            need_x, need_A, need_B, *mask,
        )  # fmt: skip
        for name, got in zip(("dx", "dAp", "dBp"), found, strict=True):
            needed = {"dx": need_x, "dAp": need_A, "dBp": need_B}[name]
            assert torch.equal(got, expected[name]) if needed else not got.numel(), name


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides(layout, dtype, dropout, device):
    """Results are right with each tensor in the layout and the others contiguous, and with all."""
    repeated = layout in (one_row, one_number)
    # Rounding errors of equal summands add up, even in the float64 formulas.
    roundings = 8 if repeated and dtype == torch.float64 else 4
    for shape, place in itertools.product((SHAPES[0], SHAPES[-1]), (0, 1, 3, 4, 5, 6, None)):
        tensors = draw(shape, dtype, device)
        tensors[2] = torch.stack([tensors[2]] * 2, -1)[:, 0]
        for i in (place,) if place is not None else (0, 1, 3, 4, 5, 6):
            tensors[i] = layout(tensors[i])
        given = draw_mask(tensors[0], dropout)
        check_values(operators, formulas, tensors, *given, roundings)


@pytest.mark.parametrize("missing", ["x", "U"])
def test_what_a_gradient_needs_must_be_given(missing, device):
    x, weight, _, Ap, Bp, grad, U = draw(SHAPES[0], torch.float32, device)
    given = (None, U, True, False) if missing == "x" else (x, None, False, True)
    x, U, need_A, need_B = given
    with pytest.raises(
        (ValueError, RuntimeError), match=f"expected.*{missing}|{missing}: expected"
    ):
        ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, False, need_A, need_B)
