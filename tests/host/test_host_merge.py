"""dW of all layers of a group, and adding it to their weights: in batches, or where they lie."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.operators import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (layers, in, out, rank)
SHAPES = ((1, 9, 7, 3), (3, 5, 6, 4), (2, 1, 8, 1), (4, 16, 1, 7), (2, 31, 18, 39))


def draw_packs(shape, dtype, by_columns=False):
    layers, width, out, rank = shape
    if by_columns:
        Ap = torch.randn(layers, width, rank).to(dtype).transpose(1, 2)
        return Ap, torch.randn(layers, out, rank).to(dtype).transpose(1, 2)
    return torch.randn(layers, rank, width).to(dtype), torch.randn(layers, rank, out).to(dtype)


def products(Ap, Bp):
    """Bp^T Ap in float64, and the same of the magnitudes."""
    up, down = Bp.double().transpose(1, 2), Ap.double()
    return up @ down, up.abs() @ down.abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_group(host, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape, by_columns in itertools.product(SHAPES, (False, True)):
        Ap, Bp = draw_packs(shape, dtype, by_columns)
        delta = host.ops.delta_group(Ap, Bp)
        expected, size = products(Ap, Bp)
        assert delta.dtype == wide
        assert delta.is_contiguous()
        assert ((delta.double() - expected).abs() <= 4 * torch.finfo(wide).eps * size).all()


def test_delta_of_one_pack_in_every_layer(host):
    """A pool's factors repeat with stride 0."""
    Ap, Bp = draw_packs((1, 9, 7, 3), torch.float32)
    delta = host.ops.delta_group(Ap.expand(4, -1, -1), Bp.expand(4, -1, -1))
    assert torch.equal(delta, (host.ops.delta_group(Ap, Bp)).expand(4, -1, -1))


def as_rows(weight):
    return weight.contiguous()


def as_columns(weight):
    return weight.t().contiguous().t()


def as_every_other(weight):
    out = weight.new_zeros(weight.shape[0], 2 * weight.shape[1])[:, ::2]
    return out.copy_(weight)


def as_part(weight):
    return torch.cat((weight, weight), 1)[:, : weight.shape[1]]


@pytest.mark.parametrize("layout", [as_rows, as_columns, as_part, as_every_other])
@pytest.mark.parametrize("packed", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_group(host, dtype, packed, layout):
    """Rounded once: within half a unit of the exact sum, beyond what float32 sums lose."""
    for shape in SHAPES:
        Ap, Bp = draw_packs(shape, packed)
        weights = [layout(torch.randn(shape[2], shape[1]).to(dtype)) for _ in Ap]
        delta, size = products(Ap, Bp)
        expected = [w.double() + change for w, change in zip(weights, delta, strict=True)]
        strides, pointers = weights[0].stride(), [w.data_ptr() for w in weights]
        assert host.ops.merge_group(weights, Ap, Bp) is None
        assert weights[0].stride() == strides
        assert [w.data_ptr() for w in weights] == pointers
        for weight, value, bound in zip(weights, expected, size, strict=True):
            sums = 4 * torch.finfo(torch.float32).eps * (bound + value.abs())
            if torch.float64 in (dtype, packed):
                sums = 4 * torch.finfo(torch.float64).eps * (bound + value.abs())
            rounding = torch.finfo(dtype).eps * value.abs()  # half a unit, with a margin of 2
            assert ((weight.double() - value).abs() <= rounding + sums).all()


def test_products(host):
    """float32 weights take a product each, without TF32; others go through float32 in a batch."""
    Ap, Bp = draw_packs((3, 5, 6, 4), torch.float32)
    weights = [torch.randn(6, 5) for _ in range(3)]
    host.reset()
    host.ops.merge_group(weights, Ap, Bp)
    host.ops.merge_group([w.bfloat16() for w in weights], Ap, Bp)
    host.ops.delta_group(Ap, Bp)
    rest = "m=5 n=6 k=4 batch=3 beta={} out=4 math=16"
    strides = " strides=20,24,30"
    assert host.calls() == [
        *["Matmul m=5 n=6 k=4 batch=1 beta=1 out=4 compute=32F"] * 3,
        "GemmStridedBatchedEx " + rest.format(1) + strides,
        "GemmStridedBatchedEx " + rest.format(0) + strides,
    ]


@pytest.mark.parametrize("other", [as_columns, as_part])
def test_merge_of_weights_that_lie_differently(host, other):
    Ap, Bp = draw_packs((2, 5, 6, 4), torch.float32)
    weights = [as_rows(torch.randn(6, 5)), other(torch.randn(6, 5))]
    expected = [w + d for w, d in zip(weights, host.ops.delta_group(Ap, Bp), strict=True)]
    host.ops.merge_group(weights, Ap, Bp)
    torch.testing.assert_close(weights, expected)


def test_merge_in_steps(host):
    """Sums of large layers stand in memory one after the other, not all at once."""
    Ap, Bp = draw_packs((2, 8192, 4500, 1), torch.float32)
    weights = [torch.zeros(4500, 8192, dtype=torch.bfloat16) for _ in range(2)]
    host.reset()
    host.ops.merge_group(weights, Ap, Bp)
    assert len(host.calls()) == 2
    for weight, down, up in zip(weights, Ap, Bp, strict=True):
        assert torch.equal(weight, (up.T @ down).bfloat16())


def test_opcheck(host):
    for shape in SHAPES[:3]:
        packs = draw_packs(shape, torch.float32)
        opcheck(host.ops.delta_group.default, packs)
        for dtype in (torch.float32, torch.bfloat16):
            weights = [torch.randn(shape[2], shape[1]).to(dtype) for _ in range(shape[0])]
            opcheck(host.ops.merge_group.default, (weights, *packs))


def test_refusals(host):
    Ap, Bp = draw_packs((2, 5, 6, 4), torch.float32)
    weights = [torch.randn(6, 5) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"Bp: expected shape \(2, 4, \*\), got"):
        host.ops.delta_group(Ap, Bp[:, :3])
    with pytest.raises(RuntimeError, match="Ap: expected as many layers as weights has, 1, got 2"):
        host.ops.merge_group(weights[:1], Ap, Bp)
    with pytest.raises(RuntimeError, match=r"weights: expected shape \(6, 5\), got shape \(5, 6\)"):
        host.ops.merge_group([weights[0], weights[1].t()], Ap, Bp)
    with pytest.raises(RuntimeError, match="weights: expected the dtype of"):
        host.ops.merge_group([weights[0], weights[1].half()], Ap, Bp)


@pytest.mark.parametrize("transposed", [False, True])
def test_merge_of_stacked_experts(host, transposed):
    """Views of one tensor, transposed where a model keeps (in, out); the rest of it stays."""
    Ap, Bp = draw_packs((3, 5, 6, 4), torch.float32)
    whole = torch.randn(4, *((5, 6) if transposed else (6, 5)))
    before = whole.clone()
    views = [matrix.t() if transposed else matrix for matrix in whole[:3]]
    delta = host.ops.delta_group(Ap, Bp)
    host.ops.merge_group(views, Ap, Bp)
    expected = before[:3] + (delta.transpose(1, 2) if transposed else delta)
    torch.testing.assert_close(whole[:3], expected)
    assert torch.equal(whole[3], before[3])
