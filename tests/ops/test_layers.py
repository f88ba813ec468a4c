"""Operators on the packs of all layers of a group."""

import itertools

import pytest
import torch
from torch.utils._pytree import tree_map

from rasa_ext import ops
from tests.helpers.group_cases import draw, formulas, operators
from tests.helpers.operators import (
    DTYPES,
    LAYOUTS,
    assert_within,
    check_operator,
    check_values,
    columns,
    every_other,
    part,
)

# (layers, tokens, in, out, rank); the last ones have empty sums.
SHAPES = (
    (3, 5, 9, 7, 9), (1, 1, 1, 1, 1), (2, 0, 6, 4, 2), (4, 4, 16, 1, 7), (2, 17, 16, 24, 48),
    (2, 3, 0, 7, 2), (2, 3, 9, 0, 2), (3, 4, 9, 7, 0), (2, 4, 0, 6, 0), (2, 4, 5, 0, 0),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, dtype, device):
    """Operators pass their checks with and without bias, and for all combinations of gradients."""
    x, weights, bias, Ap, Bp, grad, U = draw(shape, dtype, device)
    check_operator("delta_group", Ap, Bp)
    check_operator("merge_group", weights, Ap, Bp)
    for given in (bias, None):
        check_operator("linear_group", x, weights, given, Ap, Bp)
    for need in itertools.product((True, False), repeat=2):
        check_operator("linear_group_backward", grad, x, weights, U, Ap, Bp, *need)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linears(shape, dtype, device):
    tensors = draw(shape, dtype, device)
    found, _ = check_values(operators, formulas, tensors)
    assert found["y"].dtype == found["U"].dtype == found["dx"].dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["dAp"].dtype == found["dBp"].dtype == wide
    tensors[2] = None
    check_values(operators, formulas, tensors)


def one_layer(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [*LAYOUTS, one_layer], ids=lambda layout: layout.__name__)
def test_linears_of_any_strides(layout, device):
    """Results are right with each tensor in the layout and the others contiguous, and with all."""
    for shape, place in itertools.product((SHAPES[0], SHAPES[4]), (*range(7), None)):
        tensors = draw(shape, torch.float32, device)
        for i in range(7) if place is None else (place,):
            tensors[i] = tree_map(layout, tensors[i])
        check_values(operators, formulas, tensors)


def test_weights_that_lie_differently(device):
    tensors = draw(SHAPES[4], torch.float32, device)
    tensors[1][1] = columns(tensors[1][1])
    check_values(operators, formulas, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_in_the_accumulation_dtype(shape, dtype, device):
    """dW has the accumulation dtype, also if all layers share one expanded pack."""
    _, _, _, *packs, _, _ = draw(shape, dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in (torch.clone, columns, every_other, one_layer):
        Ap, Bp = map(layout, packs)
        found = ops.delta_group(Ap, Bp)
        assert found.dtype == wide
        assert found.is_contiguous()
        up, down = Bp.mT.double(), Ap.double()
        assert_within({"": found}, {"": up @ down}, {"": up.abs() @ down.abs()}, wide)


@pytest.mark.parametrize("layout", [torch.clone, columns, part, every_other])
@pytest.mark.parametrize("packed", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_rounds_once_into_weights_where_they_lie(dtype, packed, layout, device):
    """Weights keep their memory and strides, with all or only the last one in the layout."""
    wide = torch.float64 if torch.float64 in (dtype, packed) else torch.float32
    for shape, others in itertools.product(SHAPES, (layout, torch.clone)):
        weights, (Ap, Bp) = draw(shape, dtype, device)[1], draw(shape, packed, device)[3:5]
        weights = [*map(others, weights[1:]), layout(weights[0])]
        before = [(w.clone().double(), w.stride(), w.data_ptr()) for w in weights]
        assert ops.merge_group(weights, Ap, Bp) is None
        up, down = Bp.mT.double(), Ap.double()
        for i, (weight, (old, *where)) in enumerate(zip(weights, before, strict=True)):
            value = old + up[i] @ down[i]
            sums = 4 * torch.finfo(wide).eps * (up[i].abs() @ down[i].abs() + value.abs())
            rounding = 0.51 * torch.finfo(dtype).eps * value.abs()
            assert ((weight.double() - value).abs() <= rounding + sums).all()
            assert [weight.stride(), weight.data_ptr()] == where
            assert weight.dtype == dtype


@pytest.mark.parametrize("transposed", [False, True])
def test_merge_of_stacked_experts(transposed, device):
    """A merge into views of a stack changes only these experts, also if stored as (in, out)."""
    _, weights, _, Ap, Bp, *_ = draw(SHAPES[0], torch.float32, device)
    whole = torch.stack([w.T if transposed else w for w in [*weights, weights[0]]])
    before = whole.clone()
    ops.merge_group([each.T if transposed else each for each in whole[:3]], Ap, Bp)
    delta = Bp.mT @ Ap
    torch.testing.assert_close(whole[:3], before[:3] + (delta.mT if transposed else delta))
    assert torch.equal(whole[3], before[3])
