"""low_rank_linear, low_rank_add and their backward over a pack."""

from __future__ import annotations

import itertools

import pytest
import torch

from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.adapters import Errors, excesses
from tests.helpers.operators import (
    DTYPES,
    check_operator,
    draw_adapter,
    drop,
    floor,
    lists,
    pack,
    random_mask,
    unpacked,
)

# (tokens, in, out, Rp): odd, none of them, one.
SHAPES = ((5, 9, 7, 9), (3, 17, 2, 5), (0, 6, 4, 6), (8, 16, 24, 4), (1, 1, 1, 1), (33, 65, 31, 39))
NEEDS = list(itertools.product((True, False), repeat=3))


def draw(shape, dtype, device):
    """x, weight, bias, Ap, Bp and grad."""
    M, width, out, Rp = shape
    sizes = ((M, width), (out, width), (out,), (Rp, width), (Rp, out), (M, out))
    return [torch.randn(size, dtype=dtype, device=device) for size in sizes]


def formulas(x, weight, bias, Ap, Bp, grad, kept=None):
    U, H = drop(x, kept) @ Ap.T, grad @ Bp.T
    return {
        "y": x @ weight.T + U @ Bp + (0 if bias is None else bias),
        "U": U,
        "dx": grad @ weight + drop(H @ Ap, kept),
        "dAp": H.T @ drop(x, kept),
        "dBp": U.T @ grad,
        "added": grad + U @ Bp,
        "dx_add": drop(H @ Ap, kept),
    }


def operators(x, weight, bias, Ap, Bp, grad, *mask):
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bp, *mask)
    added, _ = ops.low_rank_add(grad, x, Ap, Bp, *mask)
    backward = ops.low_rank_linear_backward
    dx, dAp, dBp = backward(grad, x, weight, U, Ap, Bp, True, True, True, *mask)
    dx_add, *_ = backward(grad, None, None, None, Ap, Bp, True, False, False, *mask)
    found = {"y": y, "U": U, "dx": dx, "dAp": dAp, "dBp": dBp}
    return {**found, "added": added, "dx_add": dx_add}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, dtype, device):
    x, weight, bias, Ap, Bp, grad = draw(shape, dtype, device)
    for mask in ((), (random_mask(x), 1.25)):
        check_operator("low_rank_linear", x, weight, None if mask else bias, Ap, Bp, *mask)
        check_operator("low_rank_add", grad, x, Ap, Bp, *mask)
        for need in NEEDS:
            base, inputs, U = weight if mask else None, x if need[1] else None, x @ Ap.T
            args = grad, base, U if need[2] else None, Ap, Bp
            check_operator("low_rank_linear_backward", args[0], inputs, *args[1:], *need, *mask)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, dropout, device):
    """Against float64, within twice the error of the same formula in plain PyTorch."""
    ours, theirs = Errors(), Errors()
    for turn in range(32):  # pooled, since one rounding of a single number says little
        tensors = draw(shape, dtype, device)
        if turn % 2:
            tensors[2] = None
        mask, kept = (), None
        if dropout:
            mask = random_mask(tensors[0]), 1 / (1 - 0.25)
            kept = unpacked(mask[0], tensors[0].shape)
            tensors[0][~kept] *= 1e3  # what is dropped must not be seen
        found = operators(*tensors, *mask)
        reference = formulas(*(None if t is None else t.double() for t in tensors), kept)
        ours.add(found, reference)
        theirs.add(formulas(*tensors, kept), reference)
    assert {found[key].dtype for key in ("y", "U", "dx", "added", "dx_add")} == {dtype}
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["dAp"].dtype == found["dBp"].dtype == accumulated
    assert not excesses(ours, theirs, floor(dtype))[0]


@pytest.mark.parametrize("dropout", [False, True])
def test_only_what_is_needed_is_read_and_comes_back(dropout, device):
    """x is read for dAp alone, U for dBp alone."""
    tensors = draw(SHAPES[0], torch.float64, device)
    x, weight, _, Ap, Bp, grad = tensors
    mask = (random_mask(x), 1 / (1 - 0.25)) if dropout else ()
    expected = formulas(*tensors, unpacked(mask[0], x.shape) if dropout else None)
    U, names = expected["U"], ("dx", "dAp", "dBp")
    for need_x, need_A, need_B in NEEDS:
        found = torch.ops.rasa_ext.low_rank_linear_backward(
            grad, x if need_A else None, weight, U if need_B else None, Ap, Bp,
            need_x, need_A, need_B, *mask,
        )  # fmt: skip
        for name, got, needed in zip(names, found, (need_x, need_A, need_B), strict=True):
            if needed:
                torch.testing.assert_close(got, expected[name], msg=name)
            else:
                assert not got.numel()


@pytest.mark.parametrize("dropout", [False, True])
def test_any_strides(dropout, device):
    """A transposed weight, a strided x, an expanded grad, packs that are columns or views."""
    tensors = draw(SHAPES[0], torch.float64, device)
    mask = (random_mask(tensors[0]), 1 / (1 - 0.25)) if dropout else ()
    kept = unpacked(mask[0], tensors[0].shape) if dropout else None
    changes = (
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[:1].expand_as(t),
    )
    for place, change in itertools.product((0, 1, 3, 4, 5), changes):
        given = [change(t) if i == place else t for i, t in enumerate(tensors)]
        for name, value in formulas(*given, kept).items():
            found = operators(*given, *mask)[name]
            torch.testing.assert_close(found, value, msg=f"{place} {name}")


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("pooled", [6, 0, None])
def test_with_packing_the_gradients_are_the_oracles(pooled, multiple, device):
    adapter = draw_adapter(9, 7, 3, pooled, device, torch.float64)
    x, weight, bias, *_, grad = draw(SHAPES[0], torch.float64, device)
    Ap, Bp = pack(*adapter, x.dtype, multiple)
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bp)
    dx, *grads = ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, True, True, True)
    assert not any(t[adapter.d.numel() :].any() for t in grads)
    torch.testing.assert_close(y, oracle.linear(x, weight, bias, adapter))
    names = ("x", "A", "A_pool", "B", "B_pool", "d")
    made = ops.pack_group_backward(*([t] for t in grads), *lists([adapter])[2:])
    found = dict(zip(names, (dx, *made), strict=True))
    for name, value in oracle.linear_grads(grad, x, weight, adapter).items():
        torch.testing.assert_close(found[name], value.reshape(found[name].shape), msg=name)


@pytest.mark.parametrize("missing", ["x", "U"])
def test_what_a_gradient_needs_must_be_given(missing, device):
    x, weight, Ap, Bp, grad, U = (
        torch.randn(*size, device=device)
        for size in ((5, 9), (7, 9), (4, 9), (4, 7), (5, 7), (5, 4))
    )
    given = (None, U, True, False) if missing == "x" else (x, None, False, True)
    x, U, need_A, need_B = given
    with pytest.raises(
        (ValueError, RuntimeError), match=f"expected.*{missing}|{missing}: expected"
    ):
        ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, False, need_A, need_B)
