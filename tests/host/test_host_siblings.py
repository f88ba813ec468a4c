"""Siblings' host code: one down-projection for all, pairs of equal shape as one batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (in, ((out, private ranks, pooled ranks), ...))
SHAPES = (
    (9, ((12, 3, 6), (4, 3, 6), (4, 3, 6))),
    (17, ((5, 0, 5), (5, 0, 5))),
    (6, ((4, 2, None), (3, 2, None), (4, 2, None))),
    (33, ((18, 7, 32),)),
)


class Case:
    """A call of every operator, and what it must give in float64."""

    def __init__(self, shape, tokens, dtype, transposed=False, descending=False):
        generator = torch.Generator().manual_seed(tokens)
        self.width, self.layers = shape
        self.dtype = dtype

        def draw(*size, dtype=dtype):
            drawn = torch.randn(*(size[::-1] if transposed else size), generator=generator)
            return (drawn.t() if transposed and len(size) == 2 else drawn).to(dtype)

        self.x = draw(tokens, self.width)
        self.adapters = []
        for out, own, pooled in self.layers:
            pools = (
                (None, None) if pooled is None else (draw(pooled, self.width), draw(out, pooled))
            )
            rank = own + (pooled or 0)
            adapter = (draw(own, self.width), pools[0], draw(out, own), pools[1], draw(rank))
            self.adapters.append(tuple(None if t is None else t.float() for t in adapter))
        self.weights = [draw(out, self.width) for out, *_ in self.layers]
        if descending:  # later siblings at lower addresses
            whole = draw(sum(out for out, *_ in self.layers), self.width).contiguous()
            parts = whole.split([out for out, *_ in self.layers][::-1])[::-1]
            self.weights = list(parts)
        self.biases = [draw(out) for out, *_ in self.layers[:-1]] + [draw(0)]
        self.grads = [draw(tokens, out) for out, *_ in self.layers]

    def lists(self):
        by_field = zip(*self.adapters, strict=True)
        return [[t for t in kind if t is not None] for kind in by_field]


def close(found, expected, size, dtype):
    assert found.dtype == dtype
    error = (found.double() - expected).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * size + 1e-300).all()


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack(host, shape, dtype, multiple):
    """The same bits as packs of single layers."""
    case = Case(shape, 1, torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        case.adapters = [tuple(t if t is None else t.double() for t in a) for a in case.adapters]
    Ap, Bt = host.ops.pack_siblings(*case.lists(), dtype, multiple)
    rows = Ap.split([up.shape[1] for up in Bt])
    for adapter, down, up in zip(case.adapters, rows, Bt, strict=True):
        alone = host.ops.pack(*adapter, dtype, multiple)
        assert torch.equal(down, alone[0])
        assert torch.equal(up, alone[1])
    without = host.ops.pack_siblings(*case.lists()[:4], [], dtype, multiple)[1]
    for adapter, up in zip(case.adapters, without, strict=True):
        assert torch.equal(up, host.ops.pack(*adapter[:4], None, dtype, multiple)[1])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "descending"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(host, shape, tokens, dtype, layout):
    case = Case(shape, tokens, dtype, layout == "transposed", layout == "descending")
    Ap, Bt = host.ops.pack_siblings(*case.lists(), dtype, 4)
    widths = [up.shape[1] for up in Bt]
    for biases in (case.biases, []):
        y, U = host.ops.siblings_linear(case.x, case.weights, biases, Ap, Bt, None)
        assert len({t.data_ptr() for t in y if t.numel()}) == sum(bool(t.numel()) for t in y)
        check_forward(case, biases, Ap, Bt, y, U)
    args = (case.grads, case.x, case.weights, U, Ap, Bt, None)
    dx, dAp, dBt, dd = host.ops.siblings_linear_backward(*args, True, True)
    assert dd.shape == (0,)
    x, expected, size, H = case.x.double(), 0, 0, []
    for i, (grad, up, down) in enumerate(zip(case.grads, Bt, Ap.split(widths), strict=True)):
        grad, weight, up, down = (t.double() for t in (grad, case.weights[i], up, down))
        H.append(grad @ up)
        expected = expected + grad @ weight + H[i] @ down
        size = size + grad.abs() @ weight.abs() + grad.abs() @ up.abs() @ down.abs()
        inner = U.split(widths, 1)[i].double()
        close(dBt[i], grad.T @ inner, grad.abs().T @ inner.abs(), wide(dtype))
        by_size = (grad.abs() @ up.abs()).T @ x.abs()
        # H is rounded to the dtype in between.
        error = (dAp.split(widths)[i].double() - H[i].T @ x).abs()
        assert (error <= 4 * torch.finfo(dtype).eps * by_size + 1e-300).all()
    close(dx, expected, size, dtype)
    for need_x, need_adapter in itertools.product((True, False), repeat=2):
        found = host.ops.siblings_linear_backward(*args, need_x, need_adapter)
        assert torch.equal(found[0], dx if need_x else dx.new_empty(0))
        assert len(found[2]) == (len(Bt) if need_adapter else 0)
        if need_adapter:
            assert torch.equal(found[1], dAp)
            assert all(torch.equal(a, b) for a, b in zip(found[2], dBt, strict=True))


def check_forward(case, biases, Ap, Bt, y, U):
    widths = [up.shape[1] for up in Bt]
    x = case.x.double()
    for i, (up, down) in enumerate(zip(Bt, Ap.split(widths), strict=True)):
        weight, up, down = (t.double() for t in (case.weights[i], up, down))
        expected, size = x @ down.T, x.abs() @ down.abs().T
        close(U.split(widths, 1)[i], expected, size, case.dtype)
        expected = x @ weight.T + expected @ up.T
        size = x.abs() @ weight.abs().T + size @ up.abs().T
        if biases and biases[i].numel():
            expected, size = expected + biases[i].double(), size + biases[i].double().abs()
        close(y[i], expected, size, case.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(host, dtype):
    for shape, tokens in itertools.product(SHAPES, (0, 5)):
        case = Case(shape, tokens, dtype)
        ops = host.ops
        opcheck(ops.pack_siblings.default, (*case.lists(), dtype, 16))
        Ap, Bt = ops.pack_siblings(*case.lists(), dtype, 16)
        args = (case.x, case.weights, case.biases, Ap, Bt, None)
        opcheck(ops.siblings_linear.default, args)
        U = ops.siblings_linear(*args)[1]
        for need in itertools.product((True, False), repeat=2):
            args = (case.grads, case.x, case.weights, U, Ap, Bt, None, *need)
            opcheck(ops.siblings_linear_backward.default, args)


@pytest.mark.parametrize("descending", [False, True])
def test_products(host, descending):
    """One down-projection; k and v, which are of one shape, as a batch that repeats x."""
    case = Case(SHAPES[0], 17, torch.bfloat16, descending=descending)
    Ap, Bt = host.ops.pack_siblings(*case.lists(), torch.bfloat16, 16)
    host.reset()
    y, U = host.ops.siblings_linear(case.x, case.weights, case.biases, Ap, Bt, None)
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens.
    shapes = [call.partition(" beta")[0] for call in host.calls()]
    assert shapes == [
        "GemmEx m=48 n=17 k=9 batch=1",
        "GemmEx m=12 n=17 k=16 batch=1",
        "GemmEx m=4 n=17 k=16 batch=1",
        "GemmEx m=4 n=17 k=16 batch=1",
        "GemmEx m=12 n=17 k=9 batch=1",
        "GemmStridedBatchedEx m=4 n=17 k=9 batch=2",
    ]
    # Distances between neighbours are never negative.
    weights_descend = case.weights[1].data_ptr() > case.weights[2].data_ptr()
    assert (y[1].data_ptr() > y[2].data_ptr()) == weights_descend
    assert weights_descend or not descending
    counts = {(True, True): 11, (True, False): 7, (False, True): 7, (False, False): 0}
    for need, count in counts.items():
        host.reset()
        args = (case.grads, case.x, case.weights, U, Ap, Bt, None, *need)
        host.ops.siblings_linear_backward(*args)
        assert len(host.calls()) == count


def test_large_products_go_alone(host):
    """A batch of two is for products that do not fill a device."""
    x, weights = torch.randn(1, 4), [torch.randn(128 * 132, 4) for _ in range(2)]
    Ap, Bt = torch.randn(2, 4), [torch.randn(128 * 132, 1) for _ in range(2)]
    host.reset()
    host.ops.siblings_linear(x, weights, [], Ap, Bt, None)
    assert not any("Strided" in call for call in host.calls())


def test_bad_input(host):
    case = Case(SHAPES[0], 5, torch.float32)
    Ap, Bt = host.ops.pack_siblings(*case.lists(), torch.float32, 1)
    linear, x, weights = host.ops.siblings_linear, case.x, case.weights
    with pytest.raises(RuntimeError, match=r"d: expected None on a GPU"):
        linear(x, weights, [], Ap, Bt, torch.ones(Ap.shape[0]))
    with pytest.raises(RuntimeError, match=r"Ap: expected shape"):
        linear(x, weights, [], Ap[1:], Bt, None)
    with pytest.raises(RuntimeError, match=r"lists of one length, got 3 and 2"):
        linear(x, weights, [], Ap, Bt[:2], None)
    with pytest.raises(RuntimeError, match=r"biases\[i\]: expected shape"):
        linear(x, weights, [torch.zeros(3)] * 3, Ap, Bt, None)
    with pytest.raises(RuntimeError, match=r"weights\[i\]"):
        linear(x, [weights[0].half(), *weights[1:]], [], Ap, Bt, None)
    A, A_pool, B, B_pool, d = case.lists()
    with pytest.raises(RuntimeError, match=r"lists of one length"):
        host.ops.pack_siblings(A, A_pool[:1], B, B_pool, d, torch.float32, 1)
    with pytest.raises(RuntimeError, match=r"multiple: expected at least 1, got 0"):
        host.ops.pack_siblings(A, A_pool, B, B_pool, d, torch.float32, 0)
