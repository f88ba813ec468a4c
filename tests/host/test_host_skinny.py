"""Products with one narrow side: where hand-written kernels take them, and where cuBLAS does."""

from __future__ import annotations

import pytest
import torch
from test_host_dropout import SCALE, expected, random_mask
from test_host_linear import Case, assert_close, contiguous, sliced, transposed
from test_host_projections import Case as Projections
from test_host_projections import check_forward, close
from torch import Tensor

TOKENS = 1024  # from which on the kernels are asked
WIDTHS = (64, 72, 16)
# Y = U Bp and Y += X W^T; dX = H Ap and dX += G W.
REST = ["m=72 n=1024 k=16", "m=72 n=1024 k=64", "m=64 n=1024 k=16", "m=64 n=1024 k=72"]


def run(host, case: Case, *drop) -> dict[str, Tensor]:
    pack = case.Ap, case.Bp
    y, U = host.ops.low_rank_linear(case.x, case.weight, case.bias, *pack, *drop)
    added, _ = host.ops.low_rank_add(case.grad, case.x, *pack, *drop)
    call = host.ops.low_rank_linear_backward
    dx, dAp, dBp = call(case.grad, case.x, case.weight, case.U, *pack, True, True, True, *drop)
    return {"y": y, "U": U, "added": added, "dx": dx, "dAp": dAp, "dBp": dBp}


def check(host, case: Case) -> None:
    """Values without dropout and with it, and of each gradient alone."""
    wide, sizes = case.wide(), case.sizes()
    forward = wide.forward(True) | wide.backward()
    assert_close(run(host, case), forward, sizes.forward(True) | sizes.backward(), case.eps)
    mask = random_mask(case.x)
    want, bounds = expected(wide, mask), expected(sizes, mask)
    found = run(host, case, mask, SCALE)
    assert_close(found, want, bounds, case.eps)
    # dBp goes from operands to float32 without a stop in the low precision.
    assert_close({"dBp": found["dBp"]}, want, bounds, torch.finfo(torch.float32).eps)
    call, pack = host.ops.low_rank_linear_backward, (case.Ap, case.Bp)
    down = call(case.grad, case.x, None, None, *pack, False, True, False, mask, SCALE)[1]
    up = call(case.grad, None, None, case.U, *pack, False, False, True, mask, SCALE)[2]
    assert_close({"dAp": down, "dBp": up}, want, bounds, case.eps)


def products(host, case: Case, *drop) -> list[str]:
    """What cuBLAS is asked for by a forward and a backward."""
    host.reset()
    pack = case.Ap, case.Bp
    host.ops.low_rank_linear(case.x, case.weight, None, *pack, *drop)
    args = case.grad, case.x, case.weight, case.U, *pack, True, True, True
    host.ops.low_rank_linear_backward(*args, *drop)
    return [call.partition(" batch")[0].partition(" ")[2] for call in host.calls()]


@pytest.mark.parametrize("place", range(6), ids=("x", "weight", "Ap", "Bp", "grad", "U"))
@pytest.mark.parametrize("layout", [sliced, transposed], ids=lambda f: f.__name__)
def test_layouts(host, layout, place):
    layouts = [contiguous] * 6
    layouts[place] = layout
    check(host, Case(TOKENS, WIDTHS, torch.bfloat16, layouts))


@pytest.mark.parametrize(("offset", "count"), [(8, 4), (1, 6)])
def test_pieces_of_flat_buffers(host, offset, count):
    """An x that begins 8 elements into its memory is read as it lies; one in, it is cuBLAS's."""
    case = Case(TOKENS, WIDTHS, torch.bfloat16, (contiguous,))
    case.x = torch.cat([case.x.new_zeros(offset), case.x.flatten()])[offset:].view_as(case.x)
    assert len(products(host, case)) == count
    check(host, case)


def test_rows_that_lie_apart(host):
    """The mask counts along x's rows, wherever they lie."""
    case = Case(TOKENS, WIDTHS, torch.bfloat16, (contiguous,))
    case.x = torch.randn(TOKENS, 80).bfloat16()[:, 8:72]
    assert products(host, case) == REST
    check(host, case)


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
def test_the_switch(host, drop, monkeypatch):
    case = Case(TOKENS, WIDTHS, torch.bfloat16, (contiguous,))
    mask = (random_mask(case.x), SCALE) if drop else ()
    assert products(host, case, *mask) == REST
    monkeypatch.setenv("RASA_EXT_KERNELS", "cublas")
    assert len(products(host, case, *mask)) == 8
    monkeypatch.setenv("RASA_EXT_KERNELS", "")
    assert products(host, case, *mask) == REST


@pytest.mark.parametrize(
    ("tokens", "widths", "dtype"),
    [
        (TOKENS - 1, WIDTHS, torch.bfloat16),
        (TOKENS, (64, 72, 176), torch.bfloat16),
        (TOKENS, (64, 72, 24), torch.bfloat16),
        (TOKENS, (60, 68, 16), torch.bfloat16),
        (TOKENS, WIDTHS, torch.float32),
    ],
    ids=["few tokens", "many ranks", "ranks not padded", "odd widths", "float32"],
)
def test_what_is_left_to_cublas(host, tokens, widths, dtype):
    assert len(products(host, Case(tokens, widths, dtype, (contiguous,)))) == 8


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_projections(host, dtype, drop):
    """One down-projection of 48 ranks, and columns of H and U that lie side by side."""
    case = Projections((64, ((72, 16), (40, 16), (40, 16))), TOKENS, dtype)
    mask = (random_mask(case.x), SCALE) if drop else ()
    host.reset()
    y, U = host.ops.linear_projections(case.x, case.weights, case.biases, case.Ap, case.Bp, *mask)
    assert len(host.calls()) == 6
    check_forward(case, case.biases, case.Ap, case.Bp, y, U, *mask)
    args = case.grads, case.x, case.weights, U, case.Ap, case.Bp, True, True, True, *mask
    host.reset()
    found = host.ops.linear_projections_backward(*args)
    assert len(host.calls()) == 4
    for i, grad in enumerate(case.grads):  # each as a layer alone computes it
        ranks = slice(16 * i, 16 * i + 16)
        alone = host.ops.low_rank_linear_backward(
            grad, case.x, None, U[:, ranks], case.Ap[ranks], case.Bp[i], False, True, True, *mask
        )
        size = U[:, ranks].double().abs().T @ grad.double().abs()
        close(found[2][i], alone[2].double(), size, torch.float32)
        assert torch.equal(found[1][ranks], alone[1])
