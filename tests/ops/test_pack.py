"""Packs of a group's layers, and their gradients, with any strides of the parameters."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from rasa_ext import ops
from rasa_ext.ops import Factors
from tests.helpers.operators import (
    DTYPES,
    LAYOUTS,
    assert_within,
    check_operator,
    draw_group,
    lists,
    pack,
)

# (layers, in, out, private ranks, pool ranks): odd sizes, k = r, no pool, all sizes one, an empty
# pool, no features.
SHAPES = (
    (3, 9, 7, 3, 6),
    (1, 17, 2, 0, 5),
    (2, 16, 24, 4, None),
    (1, 1, 1, 1, 1),
    (3, 5, 3, 2, 0),
    (1, 65, 31, 7, 32),
    (2, 0, 7, 3, 6),
    (2, 9, 0, 3, 6),
)
# Every shape with every dtype of parameters; then more layers than a kernel takes by value, with
# more words than one upload takes.
STORED = [*itertools.product(SHAPES, DTYPES), ((120, 9, 7, 3, 6), torch.float32)]
NAMES = ("A", "A_pool", "B", "B_pool", "d")


def groups(shape, device, dtype=torch.float32):
    """Draw a group with d, and return it with d and without."""
    drawn = draw_group(*shape, device=device, dtype=dtype)
    return drawn, [each._replace(d=None) for each in drawn]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_operators(shape, dtype, device):
    for adapters, multiple in zip(groups(shape, device, dtype), (1, 4), strict=True):
        args = lists(adapters)
        check_operator("pack_group", *args, torch.bfloat16, multiple)
        packs = ops.pack_group(*args, dtype, multiple)
        downs, ups = (list(torch.randn_like(pack, dtype=torch.float32)) for pack in packs)
        for grads in ((downs, ups), (downs, []), ([], ups)):
            check_operator("pack_group_backward", *grads, *args[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "stored"), STORED, ids=str)
def test_each_factor_is_rounded_once_and_padded_with_zeros(shape, stored, dtype, device):
    """B is multiplied by d in the wider of both dtypes, then rounded once; padding is zeros."""
    layers, width, out, own, pooled = shape
    rank = own + (pooled or 0)
    wide = torch.promote_types(torch.promote_types(stored, dtype), torch.float32)
    for adapters, multiple in itertools.product(groups(shape, device, stored), (1, 2, 16)):
        Ap, Bp = ops.pack_group(*lists(adapters), dtype, multiple)
        Rp = -(-rank // multiple) * multiple
        assert (Ap.dtype, Ap.shape, Ap.is_contiguous()) == (dtype, (layers, Rp, width), True)
        assert (Bp.dtype, Bp.shape, Bp.is_contiguous()) == (dtype, (layers, Rp, out), True)
        for each, down, up in zip(adapters, Ap, Bp, strict=True):
            A, B, d = (t.to(wide) for t in each.stacked())
            assert torch.equal(down[:rank], A.to(dtype))
            assert torch.equal(up[:rank], (B * d).to(dtype).t())
            assert not down[rank:].any()
            assert not up[rank:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pack_of_one_layer(shape, dtype, device):
    """One layer's pack, differentiable or not, equals this layer's in the group's pack."""
    for adapters, multiple in itertools.product(groups(shape, device), (1, 16)):
        of_group = zip(*ops.pack_group(*lists(adapters), dtype, multiple), strict=True)
        for each, expected in zip(adapters, of_group, strict=True):
            alone = pack(*each, dtype, multiple)
            differentiable = ops.differentiable_pack(Factors(*each), dtype, multiple)
            for mine, other, theirs in zip(alone, differentiable, expected, strict=True):
                assert torch.equal(mine, theirs)
                assert other.dtype == torch.promote_types(dtype, torch.float32)
                assert torch.equal(other.to(dtype), theirs)


def formulas(dAp, dBp, B, B_pool, d):
    """Compute dA, dB and dd of every layer; the pool's gradients are sums over the layers."""
    pool = [] if B_pool is None else [B_pool]
    up = torch.stack([torch.cat([each, *pool], 1) for each in B])
    own, rank = B[0].shape[1], up.shape[2]
    down, T = torch.stack(dAp)[:, :rank], torch.stack(dBp)[:, :rank].mT
    scaled = T * torch.stack(d)[:, None] if d else T
    parts = down[:, :own], down[:, own:].sum(0), scaled[..., :own], scaled[..., own:].sum(0)
    return dict(zip(NAMES, (*parts, (T * up).sum(1)), strict=True))


@pytest.mark.parametrize(("shape", "stored"), STORED, ids=str)
def test_gradients(shape, stored, device):
    """Gradients are right from dAp and dBp, or one of them; the other's gradients are empty."""
    _, width, out, own, pooled = shape
    wide = torch.promote_types(stored, torch.float32)
    for adapters, padding in itertools.product(groups(shape, device, stored), (0, 5)):
        rows, (_, _, B, B_pool, d) = own + (pooled or 0) + padding, lists(adapters)
        downs, ups = (
            [torch.randn(rows, size, dtype=wide, device=device) for _ in B] for size in (width, out)
        )
        numbers = tree_map_only(Tensor, Tensor.double, [downs, ups, B, B_pool, d])
        expected, sizes = formulas(*numbers), formulas(*tree_map_only(Tensor, Tensor.abs, numbers))
        both = (downs, ups), (downs, []), ([], ups), ([], [])
        for given, names in zip(both, (NAMES, NAMES[:2], NAMES[2:], ()), strict=True):
            found = dict(zip(NAMES, ops.pack_group_backward(*given, B, B_pool, d), strict=True))
            assert {value.dtype for value in found.values()} == {stored}
            for name in NAMES:
                if name not in names or (name == "d" and not d):
                    assert not found.pop(name).numel()
            assert_within(found, expected, sizes, stored)
            for name in found.keys() & {"A", "B"}:  # not sums, so exact
                assert torch.equal(found[name], expected[name].to(stored)), name


def every_other_number(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def test_every_layout_gives_the_same_and_contiguous_gradients(device):
    given = [*lists(draw_group(3, 9, 7, 3, 6, device=device))]
    given += [[torch.randn(9, size, device=device) for _ in range(3)] for size in (9, 7)]

    def run(A, A_pool, B, B_pool, d, downs, ups):
        packs = ops.pack_group(A, A_pool, B, B_pool, d, torch.float32)
        return *packs, *ops.pack_group_backward(downs, ups, B, B_pool, d)

    expected = run(*given)
    for layout, place in itertools.product(LAYOUTS[:4], range(7)):
        changed = list(given)
        changed[place] = tree_map(layout if place != 4 else every_other_number, given[place])
        found = run(*changed)
        assert all(map(torch.equal, found, expected))
        assert all(map(Tensor.is_contiguous, found))


def test_a_narrow_B_beside_a_wide_A_is_packed_in_the_dtype_asked_for():
    """A and B may have different dtypes after a cast. Compiled kernels refuse that."""
    A, B, d = torch.randn(3, 9), torch.randn(7, 3).bfloat16(), torch.randn(3)
    Ap, Bp = pack(A, None, B, None, d, torch.float32)
    assert Ap.dtype == Bp.dtype == torch.float32
    assert torch.equal(Bp, B.t().float() * d[:, None])
