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

    def lists(self) -> tuple:
        return self.A, self.A_pool, self.B, self.B_pool, self.d

    def with_ones(self) -> Group:
        """The same with d of ones."""
        self.d = [torch.ones_like(each) for each in self.d]
        return self


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> bool:
    """Within a few roundings of numbers of the given size (else of the result's)."""
    size = (expected if size is None else size).abs()
    error, info = (found.double() - expected).abs(), torch.finfo(dtype)
    # Numbers below `tiny` are a step of eps * tiny apart.
    return found.dtype == dtype and bool((error <= info.eps * (4 * size + info.tiny)).all())


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
def test_pack_group(host, param, dtype):
    cases = itertools.product(SHAPES, (1, 3), (1, 8), (False, True))
    for shape, layers, multiple, by_columns in cases:
        group = Group(shape, layers, param, by_columns)
        Ap, Bp = host.ops.pack_group(*group.lists(), dtype, multiple)
        width = -(-group.rank // multiple) * multiple
        assert Ap.shape == (layers, width, shape[0])
        assert Bp.shape == (layers, width, shape[1])
        assert Ap.is_contiguous()
        assert Bp.is_contiguous()
        without = host.ops.pack_group(*group.lists()[:4], [], dtype, multiple)
        for layer in range(layers):
            check_pack(Ap[layer], Bp[layer], group, layer, dtype)
        group.with_ones()
        for layer in range(layers):
            check_pack(without[0][layer], without[1][layer], group, layer, dtype)


@pytest.mark.parametrize("by_columns", [False, True])
def test_stacked_experts(host, by_columns):
    """Views A[e], B[e] and d[e] of stacks, as of layers of one pool; B may lie by ranks."""
    group = Group((9, 7, 3, 6), 4, torch.float32)
    A, B, d = (torch.stack(each) for each in (group.A, group.B, group.d))
    if by_columns:
        A, B = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (A, B))
    group.A, group.B, group.d = list(A[::2]), list(B[::2]), list(d[::2])
    Ap, Bp = host.ops.pack_group(*group.lists(), torch.float32, 4)
    for layer in range(2):
        check_pack(Ap[layer], Bp[layer], group, layer, torch.float32)
    args = (list(Ap), list(Bp), *group.lists()[2:])
    found, expected = host.ops.pack_group_backward(*args), ops.pack_group_backward(*args)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_tables_of_several_launches(host):
    """120 layers are more than travel by value, and more words than one upload takes."""
    group = Group((9, 7, 3, 6), 120, torch.float32)
    Ap, Bp = host.ops.pack_group(*group.lists(), torch.float32, 16)
    for layer in range(120):
        check_pack(Ap[layer], Bp[layer], group, layer, torch.float32)
    _, _, dB, _, dd = host.ops.pack_group_backward(list(Ap), list(Bp), *group.lists()[2:])
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


def draw_grads(
    shape, width: int, layers: int, dtype, by_columns: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' dAp, which are parts of one tensor, and dBp, each a tensor of its own."""
    dAp = torch.randn(2 * layers, width, shape[0]).to(dtype)[::2]
    if by_columns:
        return list(dAp), [torch.randn(shape[1], width).to(dtype).t() for _ in range(layers)]
    return list(dAp), [torch.randn(width, shape[1]).to(dtype) for _ in range(layers)]


def check_gradients(found: tuple, group: Group, dAp: list, dBp: list, param: torch.dtype) -> None:
    """Every result that has elements, against the formulas."""
    layers = len(group.B)
    each = [gradients(group, dAp[i], dBp[i], i) for i in range(layers)]
    bounds = [sizes(group, dAp[i], dBp[i], i) for i in range(layers)]
    for name, mine in zip(("dA", "dA_pool", "dB", "dB_pool", "dd"), found, strict=True):
        if name.endswith("pool"):
            summed, bound = (sum(of[name] for of in all_) for all_ in (each, bounds))
            assert close(mine, summed, param, layers * bound), name
        elif mine.dim() > 1:
            for i in range(layers):
                assert close(mine[i], each[i][name], param, bounds[i][name]), name


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param", DTYPES, ids=str)
def test_pack_group_backward(host, param, grad):
    """Gradients come in any dtype and order, and with padding."""
    cases = itertools.product(SHAPES, (1, 3), (True, False), (0, 5))
    for shape, layers, by_columns, pad in cases:
        group = Group(shape, layers, param)
        dAp, dBp = draw_grads(shape, group.rank + pad, layers, grad, by_columns)
        back, rest = host.ops.pack_group_backward, group.lists()[2:]
        found = back(dAp, dBp, *rest)
        check_gradients(found, group, dAp, dBp, param)
        assert found[4].shape == (layers, group.rank)
        own, pooled = group.own, group.rank - group.own
        assert found[2].stride() == (shape[1] * max(own, 1), 1, shape[1])
        assert found[3].stride() == (1, shape[1])
        assert found[3].shape == (shape[1], pooled)
        # Either alone, and what comes of it.
        for given, parts in (((dAp, []), (0, 1)), (([], dBp), (2, 3, 4)), (([], []), ())):
            alone = back(*given, *rest)
            for i, (mine, whole) in enumerate(zip(alone, found, strict=True)):
                assert torch.equal(mine, whole if i in parts else whole.new_empty(0))
        without = back(dAp, dBp, *rest[:2], [])
        assert without[4].shape == (0,)
        check_gradients(without, group.with_ones(), dAp, dBp, param)


@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(host, param):
    for shape in SHAPES:
        group = Group(shape, 2, param)
        dAp, dBp = draw_grads(shape, group.rank, 2, torch.float32, False)
        back = group.lists()[2:]
        for d in (group.d, []):
            opcheck(host.ops.pack_group.default, (*group.lists()[:4], d, torch.bfloat16, 4))
            for given in ((dAp, dBp), (dAp, []), ([], dBp)):
                opcheck(host.ops.pack_group_backward.default, (*given, *back[:2], d))


def test_refusals(host):
    group = Group((9, 7, 3, 6), 2, torch.float32)
    A, A_pool, B, B_pool, d = group.lists()
    pack, back = host.ops.pack_group, host.ops.pack_group_backward
    with pytest.raises(RuntimeError, match=r"pack_group: d\[i\]: expected shape \(9\), got shape"):
        pack(A, A_pool, B, B_pool, [d[0], d[1][:8]], torch.float32)
    with pytest.raises(RuntimeError, match=r"B_pool: expected shape \(7, 6\), got shape \(7, 5\)"):
        pack(A, A_pool, B, B_pool[:, :5], d, torch.float32)
    with pytest.raises(RuntimeError, match="A_pool: expected both pools or neither"):
        pack(A, A_pool, B, None, d, torch.float32)
    with pytest.raises(RuntimeError, match="multiple: expected at least 1, got 0"):
        pack(A, A_pool, B, B_pool, d, torch.float32, 0)
    with pytest.raises(RuntimeError, match="B: expected as many layers as A has, 2, got 1"):
        pack(A, A_pool, B[:1], B_pool, d, torch.float32)
    with pytest.raises(RuntimeError, match="A: expected 1 to 65535 layers, got 0"):
        pack([], A_pool, [], B_pool, [], torch.float32)
    with pytest.raises(RuntimeError, match=r"A\[i\]: expected shape \(3, 9\), got shape \(2, 9\)"):
        pack([A[0], A[1][:2]], A_pool, B, B_pool, d, torch.float32)
    down, up = [torch.ones(9, 9)] * 2, [torch.ones(9, 7)] * 2
    start = "pack_group_backward: "
    with pytest.raises(RuntimeError, match=start + r"dAp\[i\]: expected at least 9 rows, .* got 8"):
        back([down[0], down[1][:8]], up, B, B_pool, d)
    with pytest.raises(RuntimeError, match=start + r"dBp\[i\]: expected shape \(\*, 7\)"):
        back(down, [each[:, :6] for each in up], B, B_pool, d)
    with pytest.raises(RuntimeError, match=start + "dBp: expected as many layers as B has, 2, got"):
        back(down, up[:1], B, B_pool, d)
    with pytest.raises(RuntimeError, match=start + "d: expected as many layers as B has, 2, got 1"):
        back(down, [], B, B_pool, d[:1])
    with pytest.raises(RuntimeError, match=start + "B: expected 1 to 65535 layers, got 0"):
        back([], [], [], B_pool, [])
