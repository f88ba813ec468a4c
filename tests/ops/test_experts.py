"""Products for each expert's rows, and packs of all experts in one tensor."""

import pytest
import torch
from torch import Tensor

from rasa_ext import ops
from rasa_ext.ops import Factors
from rasa_ext.ops import experts as module
from tests.helpers.adapters import Errors, excesses
from tests.helpers.operators import (
    DTYPES,
    check_operator,
    draw_adapter,
    every_other,
    floor,
    pack,
    shifted,
)
from tests.helpers.oracle import Adapter

# Products by expert have no compiled kernel in this package.
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# (rows of each expert, in, out): aligned or not, experts without rows, no rows at all.
SHAPES = (
    ((3, 0, 5, 1), 16, 24),
    ((0, 7, 0), 9, 5),
    ((4,), 8, 8),
    ((0, 0), 16, 8),
    ((2, 33), 1, 16),
)


def draw(shape, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x (S, in), weights (E, in, out), y (S, out), and the end of each expert's rows."""
    counts, width, out = shape

    def numbers(*size):
        return torch.randn(*size, device=device).to(dtype)

    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    rows = sum(counts)
    return numbers(rows, width), numbers(len(counts), width, out), numbers(rows, out), ends


def by_loop(shape, x, weights, y) -> tuple[Tensor, Tensor]:
    """Compute both products in float64, expert by expert."""
    rows, others = x.double().split(shape[0]), y.double().split(shape[0])
    products = [each @ weight for each, weight in zip(rows, weights.double(), strict=True)]
    outer = [each.t() @ other for each, other in zip(rows, others, strict=True)]
    return torch.cat(products), torch.stack(outer)


@devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators(shape, dtype, device):
    x, weights, y, ends = draw(shape, dtype, device)
    check_operator("experts_linear", x, weights, ends)
    check_operator("experts_linear", y, weights.transpose(1, 2), ends)
    check_operator("experts_outer", x, y, ends)


@devices
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, grouped, device, monkeypatch):
    """The grouped product and the loop are as exact as a rounded product, in both layouts."""
    if not grouped:
        monkeypatch.setattr(module, "_grouped", lambda *_: False)
    ours, theirs = Errors(), Errors()
    for _ in range(8):
        x, weights, y, ends = draw(shape, dtype, device)
        product, outer = by_loop(shape, x, weights, y)
        turned = weights.transpose(1, 2).contiguous().transpose(1, 2)
        expected = {"product": product, "turned": product, "gaps": product, "outer": outer}
        ours.add(
            {
                "product": ops.experts_linear(x, weights, ends),
                "turned": ops.experts_linear(x, turned, ends),
                "gaps": ops.experts_linear(every_other(x), every_other(shifted(weights)), ends),
                "outer": ops.experts_outer(x, y, ends),
            },
            expected,
        )
        rounded = {name: value.to(dtype) for name, value in expected.items()}
        theirs.add(rounded, expected)
    assert not excesses(ours, theirs, floor(dtype))[0]


def test_which_operands_take_torchs_product():
    x, weights, _, _ = draw(((4, 4), 16, 24))
    assert module._grouped(x, weights)
    assert module._grouped(x.bfloat16(), weights.bfloat16())
    assert module._grouped(x, weights.transpose(1, 2).contiguous().transpose(1, 2))
    assert not module._grouped(x.double(), weights.double())
    assert not module._grouped(x, weights.bfloat16())
    assert not module._grouped(x[:, ::2], weights[:, ::2])
    assert not module._grouped(x[:0], weights)
    assert not module._grouped(shifted(x), weights)
    narrow = torch.randn(8, 3), torch.randn(2, 3, 24)
    assert not module._grouped(*narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_packs_take_it_whatever_the_rank(dtype):
    multiple = ops.experts_rank_multiple(dtype)
    for rank in range(1, 20):
        Ap = torch.zeros(3, -(-rank // multiple) * multiple, 16, dtype=dtype)
        U = torch.zeros(5, Ap.shape[1], dtype=dtype)
        assert module._grouped(U, Ap) == (dtype != torch.float64)


def stack(count: int, own: int, pooled: int | None, dtype=torch.float64) -> Adapter:
    """Draw adapters (E, ...) of ``count`` experts, each with its own pool."""
    each = [draw_adapter(9, 7, own, pooled, dtype=dtype) for _ in range(count)]
    return Adapter(*(t[0] if t[0] is None else torch.stack(t) for t in zip(*each, strict=True)))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("own", "pooled"), [(3, 2), (0, 5), (4, None)])
def test_packs_are_those_of_each_expert(own, pooled, dtype, multiple):
    adapter = stack(3, own, pooled, torch.float32)
    for d in (adapter.d, None):
        wide = ops.differentiable_pack(Factors(*adapter[:4], d), dtype, multiple)
        found = [each.to(dtype) for each in wide]
        for e in range(3):
            single = Adapter(*adapter[:4], d).map(lambda t, e=e: t[e])
            for mine, theirs in zip(found, pack(*single, dtype, multiple), strict=True):
                assert mine.dtype == dtype
                assert torch.equal(mine[e], theirs)


def test_gradients_come_in_the_parameters_dtype():
    adapter = stack(2, 3, 2, torch.float32)
    Ap, Bp = ops.differentiable_pack(Factors(*adapter), torch.bfloat16, 8)
    for grad, tensor in zip(ops.pack_experts_backward(Ap, Bp, *adapter[2:]), adapter, strict=True):
        assert (grad.dtype, grad.shape) == (torch.float32, tensor.shape)
