"""A group's low-rank linears at once: what the host code hands to cuBLAS, and how it lies."""

from __future__ import annotations

import itertools

import pytest
import torch

from rasa_ext import ops
from tests.helpers.operators import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (layers, tokens, in, out, rank of the packs)
SHAPES = (
    (1, 1, 1, 1, 1), (3, 5, 9, 7, 9), (2, 17, 16, 24, 48), (2, 3, 6, 4, 5), (2, 4, 5, 6, 3),
    (2, 3, 4, 5, 2), (2, 0, 6, 4, 6), (1, 3, 4, 2, 0),
)  # fmt: skip
RESULTS = ("y", "U", "dx", "dAp", "dBp")


def as_rows(t):
    return t.contiguous()


def as_columns(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def as_part(t):
    return torch.cat((t, t), -1)[..., : t.shape[-1]]


def as_every_other(t):
    return torch.stack([t, t], -1)[..., 0]


def as_one(t):
    """One matrix for all layers; a weight is one already."""
    return t[:1].expand_as(t) if t.dim() == 3 else t


LAYOUTS = (as_rows, as_columns, as_part, as_every_other, as_one)


class Case:
    def __init__(self, shape, dtype, layouts=(as_rows,), bias=True) -> None:
        layers, tokens, width, out, rank = shape
        layout = itertools.cycle(layouts)

        def draw(*size):
            return next(layout)(torch.randn(size).to(dtype))

        self.x, self.grad = draw(layers, tokens, width), draw(layers, tokens, out)
        self.Ap, self.Bp = draw(layers, rank, width), draw(layers, rank, out)
        self.weights = [draw(out, width) for _ in range(layers)]
        self.bias = torch.randn(layers, 2 * out).to(dtype)[:, ::2] if bias else None

    def run(self, ops) -> dict[str, torch.Tensor]:
        y, U = ops.linear_group(self.x, self.weights, self.bias, self.Ap, self.Bp)
        grads = ops.linear_group_backward(*self.backward(U), True, True)
        return dict(zip(RESULTS, (y, U, *grads), strict=True))

    def backward(self, U) -> tuple:
        return self.grad, self.x, self.weights, U, self.Ap, self.Bp

    def each(self, change) -> Case:
        """The same with every tensor changed."""
        result = object.__new__(Case)
        for name, value in vars(self).items():
            if isinstance(value, list):
                changed = [change(t) for t in value]
            else:
                changed = None if value is None else change(value)
            setattr(result, name, changed)
        return result


def check(host, case: Case, dtype) -> None:
    """Within a few roundings of float64, measured by the same formulas over the magnitudes."""
    found = case.run(host.ops)
    expected = case.each(lambda t: t.double()).run(ops)
    sizes = case.each(lambda t: t.double().abs()).run(ops)
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = (value.double() - expected[name]).abs()
        assert (error <= 8 * torch.finfo(dtype).eps * sizes[name] + 1e-300).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(host, dtype):
    for shape, bias in itertools.product(SHAPES, (True, False)):
        check(host, Case(shape, dtype, bias=bias), dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(host, layout):
    """Each tensor in turn in the layout, the others contiguous; and all of them."""
    for shape in SHAPES[1:5]:
        for place in range(7):
            layouts = [as_rows] * 7
            layouts[place] = layout
            check(host, Case(shape, torch.float32, layouts), torch.float32)
        check(host, Case(shape, torch.float32, (layout,)), torch.float32)


def test_products(host):
    case = Case((3, 16, 8, 24, 2), torch.bfloat16)
    host.reset()
    _, U = host.ops.linear_group(case.x, case.weights, case.bias, case.Ap, case.Bp)
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens. The strides are those
    # of its operands A and B and of the result.
    batch = "GemmStridedBatchedEx m={} n={} k={} batch=3 beta={} out={} math=19 strides={}"
    assert host.calls() == [
        batch.format(2, 16, 8, 0, 2, "16,128,32"),
        batch.format(24, 16, 2, 1, 2, "48,32,384"),
        "GemmBatchedEx m=24 n=16 k=8 batch=3 beta=1 out=2 math=19",
    ]
    host.reset()
    host.ops.linear_group_backward(*case.backward(U), True, True)
    assert host.calls() == [
        batch.format(2, 16, 24, 0, 2, "48,384,32"),
        batch.format(24, 2, 16, 0, 4, "384,32,48"),
        batch.format(8, 2, 16, 0, 4, "128,32,16"),
        batch.format(8, 16, 2, 0, 2, "16,32,128"),
        "GemmBatchedEx m=8 n=16 k=24 batch=3 beta=1 out=2 math=19",
    ]
    counts = {(True, False): 3, (False, True): 3, (False, False): 0}
    for need, count in counts.items():
        host.reset()
        host.ops.linear_group_backward(*case.backward(U), *need)
        assert len(host.calls()) == count, need
    assert host.math_mode() == 3, "torch's math mode is put back"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["x", "weights", "layers"])
def test_what_lies_worse_than_at_16_bytes_is_no_batch_by_pointers(host, place, dtype):
    """cuBLAS does not see where pointers lead, and its kernels may fault."""
    tokens, width = (15, 9) if place == "layers" else (16, 8)
    case = Case((3, tokens, width, 24, 8), dtype)

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    if place == "x":
        case.x = moved(case.x)
    elif place == "weights":
        case.weights[1] = moved(case.weights[1])
    host.reset()
    check(host, case, dtype)
    pointers = [call for call in host.calls() if call.startswith("GemmBatchedEx")]
    assert len(pointers) == (place == "x")  # the backward reads no x there


def test_more_layers_than_a_table_of_one_launch(host):
    """A batch by pointers has three for each layer, and one launch writes 510 words."""
    case = Case((200, 2, 8, 8, 4), torch.float32)
    host.reset()
    check(host, case, torch.float32)
    assert sum("GemmBatchedEx" in call for call in host.calls()) == 2


def test_large_base_products_go_alone(host):
    """One layer fills a device: no batch by pointers, in either direction, and the same values."""
    case = Case((2, 128 * 11 + 1, 4, 128 * 11, 1), torch.float32)
    host.reset()
    found = case.run(host.ops)
    bases = [call for call in host.calls() if call.startswith("Matmul")]
    assert [call.split(" batch")[0] for call in bases] == ["Matmul m=1408 n=1409 k=4"] * 2
    assert sum("GemmBatchedEx" in call for call in host.calls()) == 1  # dx is narrow
    expected = case.run(ops)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
    wide = Case((2, 128 * 11 + 1, 128 * 11, 4, 1), torch.float32, (as_rows, as_columns, as_columns))
    host.reset()
    found = wide.run(host.ops)
    assert sum("GemmBatchedEx" in call for call in host.calls()) == 1  # y is narrow
    expected = wide.run(ops)
    torch.testing.assert_close(found["dx"], expected["dx"], rtol=1e-4, atol=1e-4)


def test_opcheck(host):
    for shape in (SHAPES[1], SHAPES[3], SHAPES[6], SHAPES[7]):
        case = Case(shape, torch.bfloat16)
        args = (case.x, case.weights, case.bias, case.Ap, case.Bp)
        opcheck(host.ops.linear_group.default, args)
        _, U = host.ops.linear_group(*args)
        for need in ((True, True), (False, False)):
            opcheck(host.ops.linear_group_backward.default, (*case.backward(U), *need))


def test_refusals(host):
    case = Case(SHAPES[1], torch.float32)
    call, pack = host.ops.linear_group, (case.Ap, case.Bp)
    with pytest.raises(RuntimeError, match=r"linear_group: Bp: expected shape \(3, 9, \*\), got"):
        call(case.x, case.weights, case.bias, case.Ap, case.Bp[:, :2])
    with pytest.raises(RuntimeError, match=r"Ap: expected shape \(3, \*, 9\), got shape"):
        call(case.x, case.weights, case.bias, case.Ap[:2], case.Bp)
    with pytest.raises(RuntimeError, match="weights: expected as many layers as x has, 3, got 2"):
        call(case.x, case.weights[:2], case.bias, *pack)
    with pytest.raises(RuntimeError, match=r"weights: expected shape \(7, 9\), got shape \(9, 7\)"):
        call(case.x, [w.t() for w in case.weights], case.bias, *pack)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \(3, 7\), got shape \(7\)"):
        call(case.x, case.weights, case.bias[0], *pack)
    with pytest.raises(RuntimeError, match=r"backward: U: expected shape \(3, 5, 9\), got shape"):
        host.ops.linear_group_backward(*case.backward(case.x[:, :4]), True, True)
