"""Choices that are made by device and dtype, each a function with its reason."""

from __future__ import annotations

import torch


def adapter_first(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the adapter's product is computed first and the base's GEMM accumulates into it.

    The large GEMM hides the accumulate and the sum is rounded once, which makes the order the more
    exact one in low precision; no device and dtype measured so far was slower for it.
    """
    del device_type, dtype
    return True


def diagonal_in_pack(device_type: str) -> bool:
    """Whether a pack made with grad carries the diagonal, rather than the linear's U.

    A GPU's pack kernel folds it in for nothing, and no token-sized tensor is touched. On a CPU the
    pack's scaling, its repetition in the backward and the reduction for d's gradient over
    (out, R) cost more than the same over (M, R): 4 to 8 % of the adapter's time in a step.
    Without grad packs are cached and always carry it.
    """
    return device_type != "cpu"


def rank_multiple(device_type: str) -> int:
    """The multiple to which a pack's rank is padded with zeros.

    On a GPU, half-precision GEMMs whose inner width is odd or only 8-aligned fall off the tensor
    cores' fast path. On a CPU a pad is work without return.
    """
    return 16 if device_type == "cuda" else 1
