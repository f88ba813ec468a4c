"""Projections of one x: one down-projection for all, and the products of each after it."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_host_dropout import SCALE, kept, random_mask

from tests.helpers.operators import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (in, ((out, rank), ...))
SHAPES = (
    (9, ((12, 9), (4, 9), (4, 9))),
    (17, ((5, 5), (5, 5))),
    (6, ((4, 2), (3, 1), (4, 0))),
    (33, ((18, 39),)),
)


class Case:
    """A call of every operator, and what it must give in float64."""

    def __init__(self, shape, tokens, dtype, transposed=False):
        generator = torch.Generator().manual_seed(tokens)
        self.width, self.layers = shape
        self.dtype = dtype

        def draw(*size, dtype=dtype):
            drawn = torch.randn(*(size[::-1] if transposed else size), generator=generator)
            return (drawn.t() if transposed and len(size) == 2 else drawn).to(dtype)

        self.x = draw(tokens, self.width)
        self.Ap = draw(sum(rank for _, rank in self.layers), self.width)
        self.Bp = [draw(rank, out) for out, rank in self.layers]
        self.weights = [draw(out, self.width) for out, _ in self.layers]
        self.biases = [draw(out) for out, _ in self.layers[:-1]] + [draw(0)]
        self.grads = [draw(tokens, out) for out, _ in self.layers]


def close(found, expected, size, dtype):
    assert found.dtype == dtype
    error = (found.double() - expected).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * size + 1e-300).all()


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(host, shape, tokens, dtype, layout):
    case = Case(shape, tokens, dtype, layout == "transposed")
    Ap, Bp = case.Ap, case.Bp
    for biases in (case.biases, []):
        y, U = host.ops.linear_projections(case.x, case.weights, biases, Ap, Bp)
        assert len({t.data_ptr() for t in y if t.numel()}) == sum(bool(t.numel()) for t in y)
        check_forward(case, biases, Ap, Bp, y, U)
    args = (case.grads, case.x, case.weights, U, Ap, Bp)
    check_backward(host, case, args, None)


def check_backward(host, case, args, mask, scale=1.0):
    """Against the formulas in float64, and each part with no more than it needs."""
    (grads, x, weights, U, Ap, Bp), drop = args, (mask, scale)
    backward, dtype = host.ops.linear_projections_backward, case.dtype
    dx, dAp, dBp = backward(*args, True, True, True, *drop)
    widths = [up.shape[0] for up in Bp]
    seen = case.x if mask is None else kept(case.x, mask)
    base = size = up_part = up_size = 0
    for i, (grad, up, down) in enumerate(zip(grads, Bp, Ap.split(widths), strict=True)):
        grad, weight, up, down = (t.double() for t in (grad, weights[i], up, down))
        H = scale * (grad @ up.T)
        base, up_part = base + grad @ weight, up_part + H @ down
        H_size = scale * (grad.abs() @ up.abs().T)
        size, up_size = size + grad.abs() @ weight.abs(), up_size + H_size @ down.abs()
        inner = U.split(widths, 1)[i].double()
        close(dBp[i], inner.T @ grad, inner.abs().T @ grad.abs(), wide(dtype))
        # H is rounded to the dtype in between.
        error = (dAp.split(widths)[i].double() - H.T @ seen.double()).abs()
        assert (
            error <= 4 * torch.finfo(dtype).eps * (H_size.T @ seen.double().abs()) + 1e-300
        ).all()
    if mask is not None:
        up_part, up_size = kept(up_part, mask), kept(up_size, mask)
    close(dx, base + up_part, size + up_size, dtype)
    for need in itertools.product((True, False), repeat=3):
        given = (grads, x if need[1] else None, weights, U if need[2] else None, Ap, Bp)
        found = backward(*given, *need, *drop)
        assert torch.equal(found[0], dx if need[0] else dx.new_empty(0))
        assert torch.equal(found[1], dAp if need[1] else dAp.new_empty(0))
        assert len(found[2]) == (len(Bp) if need[2] else 0)
        assert all(torch.equal(a, b) for a, b in zip(found[2], dBp, strict=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(host, dtype):
    """One mask, and one masked copy of x, for all."""
    for shape, tokens in itertools.product(SHAPES, (0, 1, 33)):
        case = Case(shape, tokens, dtype)
        mask = random_mask(case.x)
        Ap, Bp = case.Ap, case.Bp
        forward = (case.x, case.weights, case.biases, Ap, Bp)
        y, U = host.ops.linear_projections(*forward, mask, SCALE)
        check_forward(case, case.biases, Ap, Bp, y, U, mask, SCALE)
        args = (case.grads, case.x, case.weights, U, Ap, Bp)
        check_backward(host, case, args, mask, SCALE)


def check_forward(case, biases, Ap, Bp, y, U, mask=None, scale=1.0):
    widths = [up.shape[0] for up in Bp]
    x, seen = case.x.double(), case.x.double() if mask is None else kept(case.x.double(), mask)
    for i, (up, down) in enumerate(zip(Bp, Ap.split(widths), strict=True)):
        weight, up, down = (t.double() for t in (case.weights[i], up, down))
        expected, size = scale * (seen @ down.T), scale * (seen.abs() @ down.abs().T)
        close(U.split(widths, 1)[i], expected, size, case.dtype)
        expected = x @ weight.T + expected @ up
        size = x.abs() @ weight.abs().T + size @ up.abs()
        if biases and biases[i].numel():
            expected, size = expected + biases[i].double(), size + biases[i].double().abs()
        close(y[i], expected, size, case.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(host, dtype):
    for shape, tokens in itertools.product(SHAPES, (0, 5)):
        case = Case(shape, tokens, dtype)
        ops, Ap, Bp = host.ops, case.Ap, case.Bp
        args = (case.x, case.weights, case.biases, Ap, Bp)
        opcheck(ops.linear_projections.default, args)
        U = ops.linear_projections(*args)[1]
        mask = random_mask(case.x)
        opcheck(ops.linear_projections.default, (*args, mask, SCALE))
        for need in itertools.product((True, False), repeat=3):
            args = (case.grads, case.x, case.weights, U, Ap, Bp, *need)
            opcheck(ops.linear_projections_backward.default, args)


def test_products(host):
    """One down-projection for all; in the backward one product for dAp."""
    case = Case((9, ((12, 16), (4, 16), (4, 16))), 17, torch.bfloat16)
    Ap, Bp = case.Ap, case.Bp
    host.reset()
    _, U = host.ops.linear_projections(case.x, case.weights, case.biases, Ap, Bp)
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens.
    shapes = [call.partition(" beta")[0] for call in host.calls()]
    assert shapes == [
        "Matmul m=48 n=17 k=9 batch=1",
        "Matmul m=12 n=17 k=16 batch=1",
        "Matmul m=4 n=17 k=16 batch=1",
        "Matmul m=4 n=17 k=16 batch=1",
        "Matmul m=12 n=17 k=9 batch=1",
        "Matmul m=4 n=17 k=9 batch=1",
        "Matmul m=4 n=17 k=9 batch=1",
    ]
    # Each bias comes with its adapter; the last projection has none.
    biased = [" bias" in call for call in host.calls()]
    assert biased == [False, True, True, False, False, False, False]
    # Then each H_i with its dBp_i, which read the same; dAp, dx and the bases.
    H = ["m=16 n=17 k=12", "m=16 n=17 k=4", "m=16 n=17 k=4"]
    dBp = ["m=12 n=16 k=17", "m=4 n=16 k=17", "m=4 n=16 k=17"]
    dAp, dx = ["m=9 n=48 k=17"], ["m=9 n=17 k=48", "m=9 n=17 k=12", "m=9 n=17 k=4", "m=9 n=17 k=4"]
    both = [call for pair in zip(H, dBp, strict=True) for call in pair]
    products = {
        (True, True, True): both + dAp + dx,
        (True, False, True): both + dx,
        (True, True, False): H + dAp + dx,
        (False, True, True): both + dAp,
        (False, False, True): dBp,
        (False, False, False): [],
    }
    for need, expected in products.items():
        host.reset()
        args = (case.grads, case.x, case.weights, U, Ap, Bp, *need)
        host.ops.linear_projections_backward(*args)
        assert [c.partition(" ")[2].partition(" batch")[0] for c in host.calls()] == expected


def test_bad_input(host):
    case = Case(SHAPES[0], 5, torch.float32)
    Ap, Bp = case.Ap, case.Bp
    linear, x, weights = host.ops.linear_projections, case.x, case.weights
    with pytest.raises(RuntimeError, match=r"Ap: expected shape"):
        linear(x, weights, [], Ap[1:], Bp)
    with pytest.raises(RuntimeError, match=r"Bp: expected as many layers as weights has, 3, got 2"):
        linear(x, weights, [], Ap, Bp[:2])
    with pytest.raises(RuntimeError, match=r"biases\[i\]: expected shape"):
        linear(x, weights, [torch.zeros(3)] * 3, Ap, Bp)
    with pytest.raises(RuntimeError, match=r"weights\[i\]"):
        linear(x, [weights[0].half(), *weights[1:]], [], Ap, Bp)
