"""Packs and their gradients: what the host code hands to the kernels, against the formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rasa_ext import ops
from tests.helpers.operators import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (in, out, private ranks, pooled ranks, or None for no pool)
SHAPES = ((9, 7, 3, 6), (1, 1, 1, 0), (17, 2, 0, 5), (6, 4, 2, None), (33, 18, 7, 32))


class Group:
    """The adapters of one group's layers."""

    def __init__(self, shape, layers: int, param: torch.dtype, by_columns=False) -> None:
        generator = torch.Generator().manual_seed(layers)
        width, out, own, pooled = shape

        def draw(*size) -> Tensor:
            size = size[::-1] if by_columns else size
            drawn = torch.randn(*size, generator=generator).to(param)
            return drawn.t() if by_columns and len(size) == 2 else drawn

        self.A = [draw(own, width) for _ in range(layers)]
        self.B = [draw(out, own) for _ in range(layers)]
        self.d = [draw(own + (pooled or 0)) for _ in range(layers)]
        self.A_pool = None if pooled is None else draw(pooled, width)
        self.B_pool = None if pooled is None else draw(out, pooled)
        self.own, self.rank = own, own + (pooled or 0)

    def stacked(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """[A ; A_pool], [B | B_pool] and d in float64."""
        down, up = self.A[layer], self.B[layer]
        if self.A_pool is not None:
            down, up = torch.cat((down, self.A_pool)), torch.cat((up, self.B_pool), 1)
        return down.double(), up.double(), self.d[layer].double()

    def adapter(self, layer: int) -> tuple:
        return self.A[layer], self.A_pool, self.B[layer], self.B_pool, self.d[layer]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> bool:
    """Within a few roundings of numbers of the given size (else of the result's)."""
    size = (expected if size is None else size).abs()
    error = (found.double() - expected).abs()
    return found.dtype == dtype and bool((error <= 4 * torch.finfo(dtype).eps * size).all())


def check_pack(Ap: Tensor, Bp: Tensor, group: Group, layer: int, dtype: torch.dtype) -> None:
    down, up, d = group.stacked(layer)
    rank = group.rank
    # Sums and products are float32 at best, and float64 for float64 alone.
    assert close(Ap[:rank], down, dtype)
    assert close(Bp[:rank], (up * d).T, dtype)
    assert not Ap[rank:].any()
    assert not Bp[rank:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", DTYPES, ids=str)
def test_pack(host, param, dtype):
    for shape, multiple, by_columns in itertools.product(SHAPES, (1, 8), (False, True)):
        group = Group(shape, 1, param, by_columns)
        Ap, Bp = host.ops.pack(*group.adapter(0), dtype, multiple)
        width = -(-group.rank // multiple) * multiple
        assert Ap.shape == (width, shape[0])
        assert Bp.shape == (width, shape[1])
        assert Ap.is_contiguous()
        assert Bp.is_contiguous()
        check_pack(Ap, Bp, group, 0, dtype)
        group.d[0] = torch.ones_like(group.d[0])
        without = host.ops.pack(*group.adapter(0)[:4], None, dtype, multiple)
        check_pack(*without, group, 0, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param", DTYPES, ids=str)
def test_pack_group(host, param, dtype):
    for shape, layers in itertools.product(SHAPES, (1, 3)):
        group = Group(shape, layers, param)
        Ap, Bp = host.ops.pack_group(
            group.A, group.A_pool, group.B, group.B_pool, group.d, dtype, 8
        )
        assert Ap.is_contiguous()
        assert Bp.is_contiguous()
        for layer in range(layers):
            check_pack(Ap[layer], Bp[layer], group, layer, dtype)


@pytest.mark.parametrize("by_columns", [False, True])
def test_stacked_experts(host, by_columns):
    """Views A[e], B[e] and d[e] of stacks, as of layers of one pool; B may lie by ranks."""
    group = Group((9, 7, 3, 6), 4, torch.float32)
    A, B, d = (torch.stack(each) for each in (group.A, group.B, group.d))
    if by_columns:
        A, B = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (A, B))
    group.A, group.B, group.d = list(A[::2]), list(B[::2]), list(d[::2])
    pool = group.A_pool, group.B_pool
    Ap, Bp = host.ops.pack_group(group.A, pool[0], group.B, pool[1], group.d, torch.float32, 4)
    for layer in range(2):
        check_pack(Ap[layer], Bp[layer], group, layer, torch.float32)
    found = host.ops.pack_group_backward(Ap, Bp, group.B, pool[1], group.d)
    expected = ops.pack_group_backward(Ap, Bp, group.B, pool[1], group.d)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_tables_of_several_launches(host):
    """120 layers are more than travel by value, and more words than one upload takes."""
    group = Group((9, 7, 3, 6), 120, torch.float32)
    lists = (group.A, group.A_pool, group.B, group.B_pool, group.d)
    Ap, Bp = host.ops.pack_group(*lists, torch.float32, 16)
    for layer in range(120):
        check_pack(Ap[layer], Bp[layer], group, layer, torch.float32)
    _, _, dB, _, dd = host.ops.pack_group_backward(Ap, Bp, group.B, group.B_pool, group.d)
    for layer in range(120):
        expected = gradients(group, Ap[layer], Bp[layer], layer)
        bound = sizes(group, Ap[layer], Bp[layer], layer)
        assert close(dB[layer], expected["dB"], torch.float32, bound["dB"])
        assert close(dd[layer], expected["dd"], torch.float32, bound["dd"])


def gradients(group: Group, dAp: Tensor, dBp: Tensor, layer: int) -> dict[str, Tensor]:
    """The formulas in float64."""
    _, up, d = group.stacked(layer)
    dAp, T, own = dAp.double()[: group.rank], dBp.double()[: group.rank].T, group.own
    return {
        "dA": dAp[:own], "dA_pool": dAp[own:], "dB": (T * d)[:, :own], "dB_pool": (T * d)[:, own:],
        "dd": (T * up).sum(0),
    }  # fmt: skip


def sizes(group: Group, dAp: Tensor, dBp: Tensor, layer: int) -> dict[str, Tensor]:
    """The same of the magnitudes."""
    bound = object.__new__(Group)
    vars(bound).update(
        {
            name: [t.abs() for t in value]
            if isinstance(value, list)
            else value.abs()
            if isinstance(value, Tensor)
            else value
            for name, value in vars(group).items()
        }
    )
    return gradients(bound, dAp.abs(), dBp.abs(), layer)


def draw_grads(shape, width: int, layers: int, dtype, by_columns: bool) -> tuple[Tensor, Tensor]:
    dAp = torch.randn(layers, width, shape[0]).to(dtype)
    if by_columns:
        return dAp, torch.randn(layers, shape[1], width).to(dtype).transpose(1, 2)
    return dAp, torch.randn(layers, width, shape[1]).to(dtype)


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param", DTYPES, ids=str)
def test_pack_backward(host, param, grad):
    """Gradients come in any dtype and order, and with padding."""
    for shape, by_columns, pad in itertools.product(SHAPES, (True, False), (0, 5)):
        group = Group(shape, 1, param)
        dAp, dBp = draw_grads(shape, group.rank + pad, 1, grad, by_columns)
        dAp, dBp = dAp[0], dBp[0]
        found = host.ops.pack_backward(dAp, dBp, group.B[0], group.B_pool, group.d[0])
        expected, bounds = gradients(group, dAp, dBp, 0), sizes(group, dAp, dBp, 0)
        for (name, value), mine in zip(expected.items(), found, strict=True):
            assert close(mine, value, param, bounds[name]), name
        assert found[2].stride() == found[3].stride() == (1, shape[1])
        # Either alone, and what comes of it.
        rest = (group.B[0], group.B_pool, group.d[0])
        for given, parts in (((dAp, None), (0, 1)), ((None, dBp), (2, 3, 4))):
            alone = host.ops.pack_backward(*given, *rest)
            for i, (mine, whole) in enumerate(zip(alone, found, strict=True)):
                assert torch.equal(mine, whole if i in parts else whole.new_empty(0))
        group.d[0] = torch.ones_like(group.d[0])
        found = host.ops.pack_backward(dAp, dBp, group.B[0], group.B_pool, None)
        assert close(found[2], gradients(group, dAp, dBp, 0)["dB"], param)
        assert found[4].shape == (0,)


@pytest.mark.parametrize("param", [torch.float32, torch.float64], ids=str)
def test_pack_group_backward(host, param):
    for shape, layers, by_columns in itertools.product(SHAPES, (1, 3), (True, False)):
        group = Group(shape, layers, param)
        dAp, dBp = draw_grads(shape, group.rank + 2, layers, torch.float32, by_columns)
        found = dict(
            zip(
                ("dA", "dA_pool", "dB", "dB_pool", "dd"),
                host.ops.pack_group_backward(dAp, dBp, group.B, group.B_pool, group.d),
                strict=True,
            )
        )
        each = [gradients(group, dAp[i], dBp[i], i) for i in range(layers)]
        bounds = [sizes(group, dAp[i], dBp[i], i) for i in range(layers)]
        for name in ("dA", "dB", "dd"):
            for i in range(layers):
                assert close(found[name][i], each[i][name], param, bounds[i][name]), name
        for name in ("dA_pool", "dB_pool"):
            summed, bound = (sum(of[name] for of in all_) for all_ in (each, bounds))
            assert close(found[name], summed, param, layers * bound), name


@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(host, param):
    for shape in SHAPES:
        group = Group(shape, 2, param)
        dAp, dBp = draw_grads(shape, group.rank, 2, torch.float32, False)
        lists = (group.A, group.A_pool, group.B, group.B_pool, group.d)
        back = (group.B, group.B_pool, group.d)
        opcheck(host.ops.pack.default, (*group.adapter(0), torch.bfloat16, 4))
        opcheck(host.ops.pack_backward.default, (dAp[0], dBp[0], *group.adapter(0)[2:]))
        for given in ((dAp[0], None), (None, dBp[0])):
            opcheck(host.ops.pack_backward.default, (*given, *group.adapter(0)[2:]))
        opcheck(host.ops.pack_group.default, (*lists, torch.bfloat16, 4))
        opcheck(host.ops.pack_group_backward.default, (dAp, dBp, *back))


def test_refusals(host):
    group = Group((9, 7, 3, 6), 2, torch.float32)
    A, A_pool, B, B_pool, d = group.adapter(0)
    pack, back = host.ops.pack, host.ops.pack_backward
    with pytest.raises(RuntimeError, match=r"pack: d: expected shape \(9\), got shape \(8\)"):
        pack(A, A_pool, B, B_pool, d[:8], torch.float32)
    with pytest.raises(RuntimeError, match=r"B_pool: expected shape \(7, 6\), got shape \(7, 5\)"):
        pack(A, A_pool, B, B_pool[:, :5], d, torch.float32)
    with pytest.raises(RuntimeError, match="A_pool: expected both pools or neither"):
        pack(A, A_pool, B, None, d, torch.float32)
    with pytest.raises(RuntimeError, match="multiple: expected at least 1, got 0"):
        pack(A, A_pool, B, B_pool, d, torch.float32, 0)
    with pytest.raises(RuntimeError, match="dAp: expected at least 9 rows"):
        back(torch.ones(8, 9), torch.ones(8, 7), B, B_pool, d)
    with pytest.raises(RuntimeError, match="B: expected as many layers as A has, 2, got 1"):
        host.ops.pack_group(group.A, A_pool, group.B[:1], B_pool, group.d, torch.float32)
    with pytest.raises(RuntimeError, match=r"A\[i\]: expected shape \(3, 9\), got shape \(2, 9\)"):
        host.ops.pack_group([A, A[:2]], A_pool, group.B, B_pool, group.d, torch.float32)
