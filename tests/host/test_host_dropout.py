"""Dropout's host code: the mask, and the linears under one, whatever lies how in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_host_linear import DTYPES, LAYOUTS, WIDTHS, Case, assert_close, contiguous
from torch import Tensor

from tests.helpers.operators import opcheck

SCALE = 1.375


def random_mask(x: Tensor) -> Tensor:
    return torch.randint(256, (-(-x.numel() // 8),), dtype=torch.uint8)


def kept(x: Tensor, mask: Tensor) -> Tensor:
    """What the mask leaves of x."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(-1)
    return x * bits[: x.numel()].view(x.shape).to(x.dtype)


def expected(case: Case, mask: Tensor) -> dict[str, Tensor]:
    U = SCALE * (kept(case.x, mask) @ case.Ap.T)
    H = SCALE * (case.grad @ case.Bp.T)
    dx = kept(H @ case.Ap, mask)
    return {
        "y": case.x @ case.weight.T + U @ case.Bp + case.bias,
        "added": case.grad + U @ case.Bp,
        "U": U,
        "dx": dx + case.grad @ case.weight,
        "dx_add": dx,
        "dAp": H.T @ kept(case.x, mask),
        "dBp": case.U.T @ case.grad,
    }


def run(host, case: Case, mask: Tensor) -> dict[str, Tensor]:
    pack, drop = (case.Ap, case.Bp), (mask, SCALE)
    y, U = host.ops.low_rank_linear(case.x, case.weight, case.bias, *pack, *drop)
    added, U_again = host.ops.low_rank_add(case.grad, case.x, *pack, *drop)
    assert torch.equal(U, U_again)
    call = host.ops.low_rank_linear_backward
    dx, dAp, dBp = call(case.grad, case.x, case.weight, case.U, *pack, True, True, True, *drop)
    dx_add = call(case.grad, None, None, None, *pack, True, False, False, *drop)[0]
    dAp_alone = call(case.grad, case.x, case.weight, None, *pack, False, True, False, *drop)[1]
    assert torch.equal(dAp, dAp_alone)
    return {"y": y, "added": added, "U": U, "dx": dx, "dx_add": dx_add, "dAp": dAp, "dBp": dBp}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linears(host, dtype, layout):
    """The mask counts along the rows of x wherever these lie; few tokens are no exception."""
    for widths, tokens in itertools.product(WIDTHS[1:5], (0, 1, 17)):
        case = Case(tokens, widths, dtype, (layout,))
        mask = random_mask(case.x)
        found = run(host, case, mask)
        wide, sizes = expected(case.wide(), mask), expected(case.sizes(), mask)
        # In float64 the formulas round as well.
        assert_close(found, wide, sizes, case.eps * (1 + (dtype == torch.float64)))


def test_products_under_a_mask(host):
    """No product more than without: scales are alphas, and the base comes last."""
    case = Case(17, (9, 7, 3), torch.bfloat16, (contiguous,))
    counts = []
    for drop in ((), (random_mask(case.x), SCALE)):
        host.reset()
        host.ops.low_rank_linear(case.x, case.weight, case.bias, case.Ap, case.Bp, *drop)
        args = case.grad, case.x, case.weight, case.U, case.Ap, case.Bp, True, True, True
        host.ops.low_rank_linear_backward(*args, *drop)
        counts.append(host.calls())
    assert counts[0] == counts[1]
    assert "beta=1" in counts[1][-1]


def test_opcheck(host):
    for tokens, widths in itertools.product((0, 5), WIDTHS[:2]):
        case = Case(tokens, widths, torch.float32, (contiguous,))
        pack, drop = (case.Ap, case.Bp), (random_mask(case.x), SCALE)
        noise = torch.randint(2**62, (2,))
        forward = (case.x, case.weight, None, *pack, *drop)
        backward = (case.grad, case.x, case.weight, case.U, *pack, True, True, True, *drop)
        opcheck(host.ops.dropout.default, (noise, case.x, 0.5))
        opcheck(host.ops.low_rank_linear.default, forward)
        opcheck(host.ops.low_rank_add.default, (case.grad, case.x, *pack, *drop))
        opcheck(host.ops.low_rank_linear_backward.default, backward)


def test_the_mask_comes_from_both_words(host):
    """The key and the offset of the stream, and from nothing else."""
    x = torch.ones(100, 33)
    words = [1, 2], [1, 2], [2, 2], [1, 3]
    drawn = [host.ops.dropout(torch.tensor(each), x, 0.25) for each in words]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][1:], drawn[3][:-1])
    assert not torch.equal(drawn[0], drawn[2])
    share = kept(x, drawn[0]).mean().item()
    assert abs(share - 0.75) < 5 * (0.25 * 0.75 / 3300) ** 0.5
    assert host.ops.dropout(torch.tensor([1, 2]), x[:0], 0.25).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.0}, r"dropout: p: expected a number in \[0, 1\), got 1"),
        ({"p": -0.1}, r"p: expected a number in \[0, 1\), got -0.1"),
        ({"p": float("nan")}, r"p: expected a number in \[0, 1\), got -?nan"),
        (
            {"noise": torch.ones(3, dtype=torch.int64)},
            r"noise: expected shape \(2\), got shape \(3\)",
        ),
        ({"noise": torch.ones(2)}, "noise: expected Long, got Float"),
    ],
)
def test_refusals_of_the_mask(host, change, message):
    args = {"noise": torch.ones(2, dtype=torch.int64), "x": torch.ones(4, 4), "p": 0.5} | change
    with pytest.raises(RuntimeError, match=message):
        host.ops.dropout(*args.values())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, dtype=torch.uint8), r"mask: expected shape \(6\), got shape \(5\)"),
        (torch.ones(6), "mask: expected Byte, got Float"),
    ],
)
def test_refusals(host, mask, message):
    case = Case(5, (9, 7, 3), torch.float32, (contiguous,))
    pack, drop = (case.Ap, case.Bp), (mask, 1.0)
    with pytest.raises(RuntimeError, match=f"low_rank_linear: {message}"):
        host.ops.low_rank_linear(case.x, case.weight, None, *pack, *drop)
    with pytest.raises(RuntimeError, match=f"low_rank_add: {message}"):
        host.ops.low_rank_add(case.grad, case.x, *pack, *drop)
    args = case.grad, case.x, case.weight, case.U, *pack, True, True, True
    with pytest.raises(RuntimeError, match=f"low_rank_linear_backward: {message}"):
        host.ops.low_rank_linear_backward(*args, *drop)
