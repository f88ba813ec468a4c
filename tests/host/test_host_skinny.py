"""Products with one narrow side: when hand-written kernels compute them, and when cuBLAS does."""

import pytest
import torch

from rasa_ext import ops
from tests.helpers import projection_cases
from tests.helpers.linear_cases import draw, formulas, operators
from tests.helpers.operators import check_values, columns, draw_mask, part, shifted

SHAPE = (1024, 64, 72, 16)  # the fewest tokens for the kernels, in, out, rank
# Y = U Bp and Y += X W^T; dX = H Ap and dX += G W.
REST = ["m=72 n=1024 k=16", "m=72 n=1024 k=64", "m=64 n=1024 k=16", "m=64 n=1024 k=72"]


def gradients_alone(x, weight, bias, Ap, Bp, grad, U, *mask):
    backward = ops.low_rank_linear_backward
    _, dAp, _ = backward(grad, x, None, None, Ap, Bp, False, True, False, *mask)
    _, _, dBp = backward(grad, None, None, U, Ap, Bp, False, False, True, *mask)
    return {"dAp": dAp, "dBp": dBp}


@pytest.fixture
def check(host, monkeypatch):
    """A function that checks values with and without dropout, also of each gradient alone."""
    host.take_over(monkeypatch)

    def run(tensors) -> None:
        for dropout in (False, True):
            given = tensors, *draw_mask(tensors[0], dropout)
            found, expected = check_values(operators, formulas, *given)
            check_values(gradients_alone, formulas, *given)
            # Summed in float32, never rounded to the low precision.
            accuracy = 4 * torch.finfo(torch.float32).eps * expected["dBp"].abs().max().item()
            torch.testing.assert_close(found["dBp"], expected["dBp"].float(), rtol=0, atol=accuracy)

    return run


def products(host, x, weight, _, Ap, Bp, grad, U, *mask) -> list[str]:
    """Return the cuBLAS products of a forward and a backward."""
    host.reset()
    host.ops.low_rank_linear(x, weight, None, Ap, Bp, *mask)
    host.ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, True, True, True, *mask)
    return [call.partition(" batch")[0].partition(" ")[2] for call in host.calls()]


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 6], ids=("x", "weight", "Ap", "Bp", "grad", "U"))
@pytest.mark.parametrize("layout", [part, columns], ids=lambda f: f.__name__)
def test_layouts(check, layout, place):
    tensors = draw(SHAPE, torch.bfloat16, "cpu")
    tensors[place] = layout(tensors[place])
    check(tensors)


@pytest.mark.parametrize(("offset", "count"), [(8, 4), (1, 6)])
def test_pieces_of_flat_buffers(host, check, offset, count):
    """The kernels read an x that starts 8 elements into its memory; cuBLAS, if it starts at 1."""
    x, *others = draw(SHAPE, torch.bfloat16, "cpu")
    moved = shifted(x, offset)
    assert len(products(host, moved, *others)) == count
    check([moved, *others])


def test_rows_that_lie_apart(host, check):
    """The mask's bits follow x's rows, even with gaps between rows."""
    _, *others = draw(SHAPE, torch.bfloat16, "cpu")
    x = torch.randn(1024, 80).bfloat16()[:, 8:72]
    assert products(host, x, *others) == REST
    check([x, *others])


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
def test_the_switch(host, drop, monkeypatch):
    tensors = draw(SHAPE, torch.bfloat16, "cpu")
    mask, _ = draw_mask(tensors[0], drop)
    assert products(host, *tensors, *mask) == REST
    monkeypatch.setenv("RASA_EXT_KERNELS", "cublas")
    assert len(products(host, *tensors, *mask)) == 8
    monkeypatch.setenv("RASA_EXT_KERNELS", "")
    assert products(host, *tensors, *mask) == REST


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1023, 64, 72, 16), torch.bfloat16),
        ((1024, 64, 72, 176), torch.bfloat16),
        ((1024, 64, 72, 24), torch.bfloat16),
        ((1024, 60, 68, 16), torch.bfloat16),
        (SHAPE, torch.float32),
    ],
    ids=["few tokens", "many ranks", "ranks not padded", "odd widths", "float32"],
)
def test_what_is_left_to_cublas(host, shape, dtype):
    assert len(products(host, *draw(shape, dtype, "cpu"))) == 8


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_projections(host, dtype, drop, monkeypatch):
    """One down-projection computes 48 ranks; each projection's H and U are adjacent columns."""
    shape = 1024, 64, ((72, 16), (40, 16), (40, 16))
    tensors = projection_cases.draw(shape, dtype, "cpu")
    host.take_over(monkeypatch)
    host.reset()
    check_values(
        projection_cases.operators,
        projection_cases.formulas,
        tensors,
        *draw_mask(tensors[0], drop),
    )
    assert len(host.calls()) == 10
