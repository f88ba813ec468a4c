"""Fake kernels: shapes, dtypes and strides of every operator without its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.schemas import accumulation_dtype, padded


def pack(
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor,
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ap (Rp, in), Bt (out, Rp)."""
    width = padded(d.shape[0], multiple)
    return (
        A.new_empty((width, A.shape[1]), dtype=dtype),
        A.new_empty((B.shape[0], width), dtype=dtype),
    )


def pack_backward(
    dAp: Tensor, dBt: Tensor, B: Tensor, B_pool: Tensor | None, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dA (r-k, in), dA_pool (Lk, in), dB (out, r-k), dB_pool (out, Lk) column-major, dd (R,)."""
    out, own = B.shape
    pooled, width = d.shape[0] - own, dAp.shape[1]
    return (
        d.new_empty((own, width)),
        d.new_empty((pooled, width)),
        d.new_empty((out, own)),
        d.new_empty((pooled, out)).t(),
        d.new_empty(d.shape),
    )


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, Ap: Tensor, Bt: Tensor
) -> tuple[Tensor, Tensor]:
    """Y (M, out), U (M, Rp)."""
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], Ap.shape[0]))


def low_rank_add(y: Tensor, x: Tensor, Ap: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
    """Out (M, out), U (M, Rp)."""
    return y.new_empty(y.shape), x.new_empty((x.shape[0], Ap.shape[0]))


def low_rank_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    U: Tensor,
    Ap: Tensor,
    Bt: Tensor,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX (M, in), dAp (Rp, in), dBt (out, Rp) column-major; no elements where not needed."""
    wide = accumulation_dtype(x.dtype)
    dx = x.new_empty(x.shape if need_x else (0,))
    if not need_adapter:
        return dx, x.new_empty((0,), dtype=wide), x.new_empty((0,), dtype=wide)
    dAp = x.new_empty((Ap.shape[0], x.shape[1]), dtype=wide)
    return dx, dAp, x.new_empty((Bt.shape[1], Bt.shape[0]), dtype=wide).t()
