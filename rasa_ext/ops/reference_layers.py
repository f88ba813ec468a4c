"""PyTorch kernels of ``linear_layers`` and its backward; see ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.schemas import accumulation_dtype


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
    """Y_l = x_l W_l^T + bias_l + U_l Bt_l^T + V_l diag(d_l) Bt_pool^T."""
    y = x.new_empty((*x.shape[:2], Bt.shape[1]))
    for layer, weight in enumerate(weights):
        torch.mm(x[layer], weight.t(), out=y[layer])
    if bias is not None:
        y += bias[:, None]
    U, V = torch.bmm(x, Ap.transpose(1, 2)), x.new_empty(0)
    y.baddbmm_(U, Bt.transpose(1, 2))
    if Ap_pool is not None and Bt_pool is not None and d_pool is not None:
        # The tokens of all layers are rows of one product, which reads the pool once.
        V = torch.matmul(x, Ap_pool.t())
        y.flatten(0, 1).addmm_((V * d_pool[:, None].to(x.dtype)).flatten(0, 1), Bt_pool.t())
    return y, U, V


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
    """H = G Bt, K = G Bt_pool diag(d): dX = G W + H Ap + K Ap_pool, dAp = H^T X, dAp_pool = K^T X.

    With S = V diag(d): dBt = G^T U, dBt_pool = G^T S, dd = sum_m V * (G Bt_pool).
    """
    wide, width = accumulation_dtype(x.dtype), x.shape[2]
    pooled = 0 if Ap_pool is None else Ap_pool.shape[0]
    K = S = x.new_empty((*x.shape[:2], 0))
    dd = x.new_empty((x.shape[0], 0), dtype=wide)
    if Bt_pool is not None and d_pool is not None:
        K = torch.matmul(grad, Bt_pool)
        dd = (V * K).sum(1, dtype=wide)
        d = d_pool[:, None].to(x.dtype)
        K, S = K * d, V * d
    H = torch.bmm(grad, Bt)
    dx = x.new_empty(x.shape if need_x else (0,))
    if need_x:
        for layer, weight in enumerate(weights):
            torch.mm(grad[layer], weight, out=dx[layer])
        dx.baddbmm_(H, Ap)
        if Ap_pool is not None:
            dx.flatten(0, 1).addmm_(K.flatten(0, 1), Ap_pool)
    if not need_adapter:
        return dx, *(x.new_empty(0, dtype=wide) for _ in range(5))
    dAp = torch.bmm(H.transpose(1, 2), x).to(wide)
    dBt = torch.bmm(U.transpose(1, 2), grad).to(wide).transpose(1, 2)
    dAp_pool, dBt_pool = x.new_empty((0, width)), grad.new_empty((0, grad.shape[2]))
    if pooled:
        dAp_pool = torch.mm(K.flatten(0, 1).t(), x.flatten(0, 1))
        dBt_pool = torch.mm(S.flatten(0, 1).t(), grad.flatten(0, 1))
    return dx, dAp, dBt, dAp_pool.to(wide), dBt_pool.to(wide).t(), dd
