"""Packs of a group's layers, and gradients: every rank is a row, however A and B are stored."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from rasa_ext import ops
from rasa_ext.ops import Factors
from tests.helpers import oracle
from tests.helpers.operators import DTYPES, check_operator, draw_adapter, draw_group, lists, pack

# (layers, in, out, private ranks, pool ranks): odd, k = r, no pool, one of each, an empty pool.
SHAPES = (
    (3, 9, 7, 3, 6),
    (1, 17, 2, 0, 5),
    (2, 16, 24, 4, None),
    (1, 1, 1, 1, 1),
    (3, 5, 3, 2, 0),
    (1, 65, 31, 7, 32),
)
NAMES = ("A", "A_pool", "B", "B_pool", "d")


def groups(shape, device, dtype=torch.float32):
    """A group with d and without."""
    drawn = draw_group(*shape, device=device, dtype=dtype)
    return drawn, [each._replace(d=None) for each in drawn]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operators(shape, dtype, device):
    for adapters, multiple in zip(groups(shape, device), (1, 4), strict=True):
        args = lists(adapters)
        check_operator("pack_group", *args, dtype, multiple)
        packs = ops.pack_group(*args, dtype, multiple)
        downs, ups = (list(torch.randn_like(pack, dtype=torch.float32)) for pack in packs)
        for grads in ((downs, ups), (downs, []), ([], ups)):
            check_operator("pack_group_backward", *grads, *args[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_factor_is_rounded_once_and_padded_with_zeros(shape, dtype, device):
    layers, width, out, *_ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for adapters, multiple in itertools.product(groups(shape, device), (1, 2, 16)):
        Ap, Bp = ops.pack_group(*lists(adapters), dtype, multiple)
        assert Ap.dtype == Bp.dtype == dtype
        for i, each in enumerate(adapters):
            down, up, d = (t.to(wide) for t in each.stacked())
            rank = len(d)
            Rp = -(-rank // multiple) * multiple
            assert Ap.shape == (layers, Rp, width)
            assert Bp.shape == (layers, Rp, out)
            assert torch.equal(Ap[i, :rank], down.to(dtype))
            assert torch.equal(Bp[i, :rank], (up * d).to(dtype).t())
            assert not Ap[i, rank:].any()
            assert not Bp[i, rank:].any()
            alone = pack(*each, dtype, multiple)
            differentiable = ops.differentiable_pack(Factors(*each), dtype, multiple)
            for mine, other, theirs in zip(alone, differentiable, (Ap[i], Bp[i]), strict=True):
                assert torch.equal(mine, theirs)
                assert other.dtype == wide
                assert torch.equal(other.to(dtype), theirs)


def dense_gradients(adapters, multiple):
    """Gradients of packs, and the oracle's of the parameters, from S = dL/dW of every layer.

    dAp = Bp S, dBp = Ap S^T; the pool's are sums over the layers.
    """
    Ap, Bp = ops.pack_group(*lists(adapters), torch.float64, multiple)
    S = torch.randn_like(Bp.mT @ Ap)
    each = [oracle.adapter_grads(*of_layer) for of_layer in zip(S, adapters, strict=True)]
    expected = {
        name: (sum if "pool" in name else torch.stack)([grads[name] for grads in each])
        for name in NAMES
    }
    return list(Bp @ S), list(Ap @ S.mT), expected


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, multiple, device):
    """Together, from dAp alone and from dBp alone; what comes from an empty list is empty."""
    for adapters in groups(shape, device, torch.float64):
        downs, ups, expected = dense_gradients(adapters, multiple)
        _, _, *rest = lists(adapters)
        for given, names in ((downs, ups), NAMES), ((downs, []), NAMES[:2]), (([], ups), NAMES[2:]):
            found = dict(zip(NAMES, ops.pack_group_backward(*given, *rest), strict=True))
            for name, value in found.items():
                if name in names and (name != "d" or rest[-1]):
                    wanted = expected[name].reshape(value.shape)
                    torch.testing.assert_close(value, wanted, msg=name)
                else:
                    assert not value.numel()


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_differentiable_pack(shape, multiple, device):
    for adapters in groups(shape, device, torch.float64):
        downs, ups, expected = dense_gradients(adapters, multiple)
        leaf = functools.cache(lambda t: t.detach().requires_grad_())  # one of a pool
        leaves = [each.map(leaf) for each in adapters]
        for each, *grads in zip(leaves, downs, ups, strict=True):
            pack = ops.differentiable_pack(Factors(*each), torch.float64, multiple)
            torch.autograd.backward(pack, grads)
        for name, tensors in zip(NAMES, lists(leaves), strict=True):
            if isinstance(tensors, list) and tensors:
                found = torch.stack([t.grad for t in tensors])
                torch.testing.assert_close(found, expected[name], msg=name)
            elif tensors is not None and len(tensors):
                torch.testing.assert_close(tensors.grad, expected[name], msg=name)


def layouts(B):
    """The same numbers: by ranks, by outputs, and with gaps."""
    yield B.t().contiguous().t()
    yield B.contiguous()
    yield torch.stack([B, B], -1)[..., 0]
    yield torch.cat([B, B], 1)[:, : B.shape[1]]


def test_every_layout_gives_the_same_and_gradients_stored_by_ranks(device):
    A, A_pool, B, B_pool, d = lists(draw_group(3, 9, 7, 3, 6, device=device))
    downs, ups = ([torch.randn(9, n, device=device) for _ in B] for n in (9, 7))

    def run(A, B, B_pool):
        packs = ops.pack_group(A, A_pool, B, B_pool, d, torch.float32)
        return *packs, *ops.pack_group_backward(downs, ups, B, B_pool, d)

    expected = run(A, B, B_pool)
    of_layers = zip(*map(layouts, B), strict=True)
    for others, pool in zip(of_layers, layouts(B_pool), strict=True):
        for downs_of in (A, [each.t().contiguous().t() for each in A]):
            found = run(downs_of, list(others), pool)
            assert all(map(torch.equal, found, expected))
            *_, dB, dB_pool, _ = found
            assert dB.mT.is_contiguous()
            assert dB_pool.t().is_contiguous()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_narrow_adapters_lose_nothing_in_a_wide_pack(dtype, stored, device):
    """d is folded in the wider of the two dtypes; gradients are as good as the stored one."""
    adapter = draw_adapter(17, 9, 3, 4, device).map(lambda t: t.to(stored))
    Ap, Bp = pack(*adapter, dtype)
    _, up, d = adapter.stacked()
    accurate = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    change = oracle.delta(adapter)
    assert (Bp.double().t() @ Ap.double() - change).norm() <= accurate * change.norm()
    dAp, dBp = torch.randn_like(Ap.float()), torch.randn_like(Bp.float())
    scaled = (dBp * d[:, None]).t()
    expected = (dAp[:3], dAp[3:], scaled[:, :3], scaled[:, 3:], (up.t() * dBp).sum(1))
    found = ops.pack_group_backward([dAp], [dBp], *lists([adapter])[2:])
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == stored
        assert (got.view(value.shape) - value).norm() <= torch.finfo(stored).eps * value.norm()


def test_a_narrow_B_beside_a_wide_A_is_packed_in_the_dtype_asked_for():
    """As after a cast of one of them; the compiled kernels want one dtype, and refuse it."""
    A, B, d = torch.randn(3, 9), torch.randn(3, 7).bfloat16().t(), torch.randn(3)
    Ap, Bp = pack(A, None, B, None, d, torch.float32)
    assert Ap.dtype == Bp.dtype == torch.float32
    assert torch.equal(Bp, B.t().float() * d[:, None])
