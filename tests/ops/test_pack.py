"""pack and pack_backward: every rank is a row, however A and B are stored."""

from __future__ import annotations

import pytest
import torch

from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.operators import DTYPES, check_operator, draw_adapter

# (in, out, private ranks, pool ranks): odd, k = r, k = 0, one of each, an empty pool.
SHAPES = (
    (9, 7, 3, 6),
    (17, 2, 0, 5),
    (16, 24, 4, None),
    (1, 1, 1, 1),
    (5, 3, 2, 0),
    (65, 31, 7, 32),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, dtype, device):
    adapter = draw_adapter(*shape, device)
    for each, multiple in ((adapter, 1), (adapter._replace(d=None), 4)):
        check_operator("pack", *each, dtype, multiple)
        dAp, dBp = (torch.randn_like(t.float()) for t in ops.pack(*each, dtype, multiple))
        for grads in ((dAp, dBp), (dAp, None), (None, dBp)):
            check_operator("pack_backward", *grads, *each[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_factor_is_rounded_once_and_padded_with_zeros(shape, dtype, device):
    drawn = draw_adapter(*shape, device)
    for adapter in (drawn, drawn._replace(d=None)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        down, up, d = (t.to(wide) for t in adapter.stacked())
        rank = len(d)
        for multiple in (1, 2, 16):
            Ap, Bp = ops.pack(*adapter, dtype, multiple)
            Rp = -(-rank // multiple) * multiple
            assert Ap.shape == (Rp, shape[0])
            assert Bp.shape == (Rp, shape[1])
            assert Ap.dtype == Bp.dtype == dtype
            assert torch.equal(Ap[:rank], down.to(dtype))
            assert torch.equal(Bp[:rank], (up * d).to(dtype).t())
            assert not Ap[rank:].any()
            assert not Bp[rank:].any()


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, multiple, device):
    """From S = dL/dW of the dense weight: dAp = Bp S, dBp = Ap S^T."""
    adapter = draw_adapter(*shape, device, torch.float64)
    Ap, Bp = ops.pack(*adapter, torch.float64, multiple)
    S = torch.randn(shape[1], shape[0], dtype=torch.float64, device=device)
    expected = oracle.adapter_grads(S, adapter)
    names = ("A", "A_pool", "B", "B_pool", "d")
    dAp, dBp = Bp @ S, Ap @ S.t()
    found = dict(zip(names, ops.pack_backward(dAp, dBp.clone(), *adapter[2:]), strict=True))
    for name in names:
        torch.testing.assert_close(found[name], expected[name].reshape(found[name].shape), msg=name)
    dA, dA_pool, *others = ops.pack_backward(dAp, None, *adapter[2:])
    assert torch.equal(dA, found["A"])
    assert torch.equal(dA_pool, found["A_pool"])
    assert not any(t.numel() for t in others)
    dA, dA_pool, *others = ops.pack_backward(None, dBp.clone(), *adapter[2:])
    assert not dA.numel()
    assert not dA_pool.numel()
    assert all(torch.equal(t, found[n]) for t, n in zip(others, names[2:], strict=True))
    *_, dB, dB_pool, dd = ops.pack_backward(None, dBp.clone(), adapter.B, adapter.B_pool, None)
    rows = torch.cat([dB.t(), dB_pool.view(shape[1], -1).t()])
    assert torch.equal(rows, dBp[: len(rows)])
    assert not dd.numel()


def layouts(B):
    """The same numbers: by ranks, by outputs, and with gaps."""
    yield B.t().contiguous().t()
    yield B.contiguous()
    yield torch.stack([B, B], -1)[..., 0]
    yield torch.cat([B, B], 1)[:, : B.shape[1]]


def test_every_layout_gives_the_same_and_gradients_stored_by_ranks(device):
    adapter = draw_adapter(9, 7, 3, 6, device)
    dAp, dBp = torch.randn(9, 9, device=device), torch.randn(9, 7, device=device)

    def run(each):
        grads = ops.pack_backward(dAp.clone(), dBp.clone(), *each[2:])
        return *ops.pack(*each, torch.float32, 1), *grads

    expected = run(adapter)
    for B, B_pool in zip(layouts(adapter.B), layouts(adapter.B_pool), strict=True):
        for A in (adapter.A, adapter.A.t().contiguous().t()):
            found = run(adapter._replace(A=A, B=B, B_pool=B_pool))
            assert all(map(torch.equal, found, expected))
            _, _, _, _, dB, dB_pool, _ = found
            assert dB.t().is_contiguous()
            assert dB_pool.t().is_contiguous()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_narrow_adapters_lose_nothing_in_a_wide_pack(dtype, stored, device):
    """d is folded in the wider of the two dtypes; gradients are as good as the stored one."""
    adapter = draw_adapter(17, 9, 3, 4, device).map(lambda t: t.to(stored))
    Ap, Bp = ops.pack(*adapter, dtype, 1)
    _, up, d = adapter.stacked()
    accurate = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    change = oracle.delta(adapter)
    assert (Bp.double().t() @ Ap.double() - change).norm() <= accurate * change.norm()
    dAp, dBp = torch.randn_like(Ap.float()), torch.randn_like(Bp.float())
    scaled = (dBp * d[:, None]).t()
    expected = (dAp[:3], dAp[3:], scaled[:, :3], scaled[:, 3:], (up.t() * dBp).sum(1))
    found = ops.pack_backward(dAp.clone(), dBp.clone(), *adapter[2:])
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == stored
        assert (got - value).norm() <= torch.finfo(stored).eps * value.norm()


def test_a_narrow_B_beside_a_wide_A_is_packed_in_the_dtype_asked_for():
    """As after a cast of one of them; the compiled kernels want one dtype, and refuse it."""
    A, B, d = torch.randn(3, 9), torch.randn(3, 7).bfloat16().t(), torch.randn(3)
    Ap, Bp = ops.pack(A, None, B, None, d, torch.float32)
    assert Ap.dtype == Bp.dtype == torch.float32
    assert torch.equal(Bp, B.t().float() * d[:, None])
