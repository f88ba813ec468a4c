"""PyTorch kernels of the operators: the fallback of every device and what others are held to.

Each function implements the operator of its name; shapes and contracts stand in ``schemas``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.heuristics import adapter_first
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
    """Ap = [A ; A_pool], Bt = [B | B_pool] diag(d), cast to ``dtype`` and zero-padded."""
    rank, own = d.numel(), A.shape[0]
    width = padded(rank, multiple)
    make = A.new_empty if width == rank else A.new_zeros
    Ap = make((width, A.shape[1]), dtype=dtype)
    Bt = make((B.shape[0], width), dtype=dtype)
    if own:
        Ap[:own].copy_(A)
        torch.mul(B, d[:own], out=Bt[:, :own])
    if A_pool is not None and B_pool is not None:
        Ap[own:rank].copy_(A_pool)
        torch.mul(B_pool, d[own:], out=Bt[:, own:rank])
    return Ap, Bt


def pack_backward(
    dAp: Tensor, dBt: Tensor, B: Tensor, B_pool: Tensor | None, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With T = dBt: dB = T diag(d), dd_j = sum_n [B | B_pool][n, j] T[n, j]; dA is rows of dAp."""
    own, rank = B.shape[1], d.numel()
    out, dtype = B.shape[0], d.dtype
    if dBt.dtype != dtype:
        dBt = dBt.to(dtype)
    dA = torch.empty((own, dAp.shape[1]), dtype=dtype, device=d.device).copy_(dAp[:own])
    dA_pool = torch.empty((rank - own, dAp.shape[1]), dtype=dtype, device=d.device)
    dA_pool.copy_(dAp[own:rank])
    dd = torch.empty_like(d)
    dB = torch.empty((out, own), dtype=dtype, device=d.device)
    dB_pool = torch.empty((rank - own, out), dtype=dtype, device=d.device).t()
    if own:
        own_T = dBt[:, :own]
        torch.mul(own_T, d[:own], out=dB)
        torch.sum(own_T * B, 0, out=dd[:own])
    if B_pool is not None:
        pool_T = dBt[:, own:rank]
        torch.mul(pool_T, d[own:], out=dB_pool)
        torch.sum(pool_T * B_pool, 0, out=dd[own:])
    return dA, dA_pool, dB, dB_pool, dd


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, Ap: Tensor, Bt: Tensor
) -> tuple[Tensor, Tensor]:
    """Y = X W^T + bias + U Bt^T, U = X Ap^T."""
    U = x @ Ap.t()
    if adapter_first(x.device.type, x.dtype):
        y = U @ Bt.t() if bias is None else torch.addmm(bias, U, Bt.t())
        return y.addmm_(x, weight.t()), U
    y = torch.nn.functional.linear(x, weight, bias)
    return y.addmm_(U, Bt.t()), U


def low_rank_add(y: Tensor, x: Tensor, Ap: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
    """Y + U Bt^T, U = X Ap^T."""
    U = x @ Ap.t()
    return torch.addmm(y, U, Bt.t()), U


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
    """H = G Bt, T = G^T U; dX = G W + H Ap, dAp = H^T X, dBt = T."""
    H = grad @ Bt
    dx = dAp = dBt = None
    if need_x:
        if weight is None:
            dx = H @ Ap
        elif adapter_first(x.device.type, x.dtype):
            dx = (H @ Ap).addmm_(grad, weight)
        else:
            dx = (grad @ weight).addmm_(H, Ap)
    wide = accumulation_dtype(x.dtype)
    if need_adapter:
        # U^T G rather than G^T U: a third faster in float32, and each rank's gradient contiguous.
        dAp = (H.t() @ x).to(wide)
        dBt = (U.t() @ grad).to(wide).t()
    return (
        grad.new_empty(0) if dx is None else dx,
        grad.new_empty(0, dtype=wide) if dAp is None else dAp,
        grad.new_empty(0, dtype=wide) if dBt is None else dBt,
    )
