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
    d: Tensor | None,
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ap (Rp, in), Bt (out, Rp)."""
    width = padded(A.shape[0] + (0 if A_pool is None else A_pool.shape[0]), multiple)
    return (
        A.new_empty((width, A.shape[1]), dtype=dtype),
        A.new_empty((B.shape[0], width), dtype=dtype),
    )


def pack_backward(
    dAp: Tensor, dBt: Tensor, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dA (r-k, in), dA_pool (Lk, in), dB (out, r-k), dB_pool (out, Lk) column-major, dd (R,)."""
    out, own = B.shape
    pooled, width = 0 if B_pool is None else B_pool.shape[1], dAp.shape[1]
    return (
        B.new_empty((own, width)),
        B.new_empty((pooled, width)),
        B.new_empty((out, own)),
        B.new_empty((pooled, out)).t(),
        B.new_empty((0 if d is None else own + pooled,)),
    )


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    Ap: Tensor,
    Bt: Tensor,
    d: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Y (M, out), U (M, Rp)."""
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], Ap.shape[0]))


def low_rank_add(
    y: Tensor,
    x: Tensor,
    Ap: Tensor,
    Bt: Tensor,
    d: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Out (M, out), U (M, Rp)."""
    return y.new_empty(y.shape), x.new_empty((x.shape[0], Ap.shape[0]))


def low_rank_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    U: Tensor,
    Ap: Tensor,
    Bt: Tensor,
    d: Tensor | None,
    need_x: bool,
    need_adapter: bool,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX (M, in), dAp (Rp, in), dBt (out, Rp) column-major, dd (Rp,); empty where not needed."""
    wide = accumulation_dtype(x.dtype)
    dx = x.new_empty(x.shape if need_x else (0,))
    dd = x.new_empty(Ap.shape[:1] if need_adapter and d is not None else (0,), dtype=wide)
    if not need_adapter:
        return dx, x.new_empty((0,), dtype=wide), x.new_empty((0,), dtype=wide), dd
    dAp = x.new_empty((Ap.shape[0], x.shape[1]), dtype=wide)
    return dx, dAp, x.new_empty((Bt.shape[1], Bt.shape[0]), dtype=wide).t(), dd


def pack_siblings(
    A: list[Tensor],
    A_pool: list[Tensor],
    B: list[Tensor],
    B_pool: list[Tensor],
    d: list[Tensor],
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, list[Tensor]]:
    """Ap (Rp, in) of all, Bt (out_i, Rp_i) of each."""
    widths = [padded(a.shape[0], multiple) for a in A]
    if A_pool:
        ranks = (a.shape[0] + pool.shape[0] for a, pool in zip(A, A_pool, strict=True))
        widths = [padded(rank, multiple) for rank in ranks]
    Ap = A[0].new_empty((sum(widths), A[0].shape[1]), dtype=dtype)
    Bt = [b.new_empty((b.shape[0], width), dtype=dtype) for b, width in zip(B, widths, strict=True)]
    return Ap, Bt


def siblings_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    Ap: Tensor,
    Bt: list[Tensor],
    d: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Y (M, out_i) of each, U (M, Rp)."""
    y = [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]
    return y, x.new_empty((x.shape[0], Ap.shape[0]))


def siblings_linear_backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    U: Tensor,
    Ap: Tensor,
    Bt: list[Tensor],
    d: Tensor | None,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """dX (M, in), dAp (Rp, in), dBt (out_i, Rp_i) column-major, dd (Rp,); as the single one."""
    wide = accumulation_dtype(x.dtype)
    dx = x.new_empty(x.shape if need_x else (0,))
    dd = x.new_empty(Ap.shape[:1] if need_adapter and d is not None else (0,), dtype=wide)
    if not need_adapter:
        return dx, x.new_empty((0,), dtype=wide), [], dd
    dAp = x.new_empty((Ap.shape[0], x.shape[1]), dtype=wide)
    dBt = [x.new_empty((up.shape[1], up.shape[0]), dtype=wide).t() for up in Bt]
    return dx, dAp, dBt, dd


def dropout_mask(noise: Tensor, x: Tensor, p: float) -> Tensor:
    """Mask (ceil(x.numel() / 8),)."""
    return noise.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def pack_layers(
    A: list[Tensor],
    A_pool: Tensor | None,
    B: list[Tensor],
    B_pool: Tensor | None,
    d: list[Tensor],
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ap (L, Rp, in), Bt (L, out, Rp)."""
    Ap, Bt = pack(A[0], A_pool, B[0], B_pool, d[0], dtype, multiple)
    return Ap.new_empty((len(A), *Ap.shape)), Bt.new_empty((len(A), *Bt.shape))


def pack_layers_backward(
    dAp: Tensor, dBt: Tensor, B: list[Tensor], B_pool: Tensor | None, d: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dA (L, r-k, in), dA_pool (Lk, in), dB (L, out, r-k), dB_pool (out, Lk), dd (L, R)."""
    dA, dA_pool, dB, dB_pool, dd = pack_backward(dAp[0], dBt[0], B[0], B_pool, d[0])
    stacked = (t.new_empty((len(B), *t.shape)) for t in (dA, dB, dd))
    dA, dB, dd = stacked
    return dA, dA_pool, dB, dB_pool, dd


def delta_layers(Ap: Tensor, Bt: Tensor) -> Tensor:
    """Delta (L, out, in)."""
    shape = (Ap.shape[0], Bt.shape[1], Ap.shape[2])
    return Ap.new_empty(shape, dtype=accumulation_dtype(Ap.dtype))


def merge_layers(weights: list[Tensor], Ap: Tensor, Bt: Tensor, sign: float = 1.0) -> None:
    """Nothing: the weights are changed in place."""


def linear_layers(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    Ap: Tensor,
    Bt: Tensor,
    Ap_pool: Tensor | None,
    Bt_pool: Tensor | None,
    d_pool: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y (L, M, out), U (L, M, Rp), V (L, M, P)."""
    stack = x.shape[:2]
    V = (0,) if Ap_pool is None else (*stack, Ap_pool.shape[0])
    return (
        x.new_empty((*stack, Bt.shape[1])),
        x.new_empty((*stack, Ap.shape[1])),
        x.new_empty(V),
    )


def linear_layers_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    U: Tensor,
    V: Tensor,
    Ap: Tensor,
    Bt: Tensor,
    Ap_pool: Tensor | None,
    Bt_pool: Tensor | None,
    d_pool: Tensor | None,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As of one layer: dBt (L, out, Rp) and dBt_pool (out, P) have columns of neighbours."""
    wide = accumulation_dtype(x.dtype)
    (layers, out, rank), width = Bt.shape, x.shape[2]
    pooled = 0 if Ap_pool is None else Ap_pool.shape[0]
    dx = x.new_empty(x.shape if need_x else (0,))
    if not need_adapter:
        return dx, *(x.new_empty((0,), dtype=wide) for _ in range(5))
    return (
        dx,
        x.new_empty((layers, rank, width), dtype=wide),
        x.new_empty((layers, rank, out), dtype=wide).transpose(1, 2),
        x.new_empty((pooled, width), dtype=wide),
        x.new_empty((pooled, out), dtype=wide).t(),
        x.new_empty((layers, pooled), dtype=wide),
    )
