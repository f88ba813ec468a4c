"""Packs and their gradients: input that the host code accepts beyond the contract, and errors."""

import pytest
import torch

from tests.helpers.operators import draw_group, lists


def test_gradients_in_a_low_precision(host):
    """Gradients that a module has cast are converted to float32 before any sum."""
    _, _, *rest = lists(draw_group(3, 9, 7, 3, 6))
    given = [[torch.randn(9, size).bfloat16() for _ in range(3)] for size in (9, 7)]
    wide = [[each.float() for each in grads] for grads in given]
    back = host.ops.pack_group_backward
    assert all(map(torch.equal, back(*given, *rest), back(*wide, *rest)))


def test_refusals(host):
    A, A_pool, B, B_pool, d = lists(draw_group(2, 9, 7, 3, 6))
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
