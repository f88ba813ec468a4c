"""Operators over the L layers of one group, which share A_pool and B_pool.

Results are stacked along a new first dimension. See ``pack`` and ``linear`` for a single layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext.ops.library import accumulation_dtype, operator
from rasa_ext.ops.pack import as_results, factor_grads, packed


@operator(
    "pack_group(Tensor[] A, Tensor? A_pool, Tensor[] B, Tensor? B_pool, Tensor[] d, "
    "ScalarType dtype, int multiple=1) -> (Tensor Ap, Tensor Bp)"
)
def pack_group(
    A: Sequence[Tensor],
    A_pool: Tensor | None,
    B: Sequence[Tensor],
    B_pool: Tensor | None,
    d: Sequence[Tensor],
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Pack every layer to Ap (L, Rp, in) and Bp (L, Rp, out)."""
    packs = [
        packed(a, A_pool, b, B_pool, v, dtype, multiple) for a, b, v in zip(A, B, d, strict=True)
    ]
    down, up = zip(*packs, strict=True)
    return torch.stack(down), torch.stack(up)


@operator(
    "pack_group_backward(Tensor dAp, Tensor dBp, Tensor[] B, Tensor? B_pool, Tensor[] d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)"
)
def pack_group_backward(
    dAp: Tensor, dBp: Tensor, B: Sequence[Tensor], B_pool: Tensor | None, d: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``pack_backward`` for every layer; the pool's gradients are summed in layer order.

    dA (L, r-k, in), dA_pool (L*k, in), dB (L, out, r-k) and dB_pool (out, L*k), both stored by
    ranks, and dd (L, R).
    """
    own, pooled = B[0].shape[1], 0 if B_pool is None else B_pool.shape[1]
    layers, _, out = dBp.shape
    dA = B[0].new_empty((layers, own, dAp.shape[2]))
    dB = B[0].new_empty((layers, own, out))
    dd = B[0].new_empty((layers, own + pooled))
    dA_pool, dB_pool = B[0].new_zeros((pooled, dAp.shape[2])), B[0].new_zeros((pooled, out))
    for i in range(layers):
        parts = as_results(B[i], factor_grads(dAp[i], dBp[i].clone(), B[i], B_pool, d[i]))
        dA[i], dB[i], dd[i] = parts[0], parts[2].t(), parts[4]
        dA_pool += parts[1]
        dB_pool += parts[3].t()
    return dA, dA_pool, dB.transpose(1, 2), dB_pool.t(), dd


@operator("delta_group(Tensor Ap, Tensor Bp) -> Tensor")
def delta_group(Ap: Tensor, Bp: Tensor) -> Tensor:
    """Compute dW = Bp^T Ap of every layer, (L, out, in) in the accumulation dtype."""
    wide = accumulation_dtype(Ap.dtype)
    with torch.autocast(Ap.device.type, enabled=False):
        return torch.bmm(Bp.transpose(1, 2).to(wide), Ap.to(wide))


@operator("merge_group(Tensor(a!)[] weights, Tensor Ap, Tensor Bp) -> ()")
def merge_group(weights: Sequence[Tensor], Ap: Tensor, Bp: Tensor) -> None:
    """Add Bp^T Ap to every layer's W in place, summed wide and rounded once."""
    narrow = accumulation_dtype(Ap.dtype)
    for weight, down, up in zip(weights, Ap, Bp, strict=True):
        wide = torch.promote_types(accumulation_dtype(weight.dtype), narrow)
        (delta,) = delta_group(down.to(wide)[None], up.to(wide)[None])
        weight.copy_(delta.add_(weight.to(wide)))


@operator(
    "linear_group(Tensor x, Tensor[] weights, Tensor? bias, Tensor Ap, Tensor Bp, "
    "Tensor? Ap_pool, Tensor? Bp_pool, Tensor? d_pool) -> (Tensor y, Tensor U, Tensor V)"
)
def linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    Ap: Tensor,
    Bp: Tensor,
    Ap_pool: Tensor | None,
    Bp_pool: Tensor | None,
    d_pool: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Y_l = x_l W_l^T + bias_l + U_l Bp_l + V_l diag(d_l) Bp_pool for x (L, M, in).

    y (L, M, out), U_l = x_l Ap_l^T (L, M, Rp) and V_l = x_l Ap_pool^T (L, M, P). Ap (L, Rp, in) and
    Bp (L, Rp, out) are packs, and bias is (L, out). Ap_pool (P, in) and Bp_pool (P, out) are the
    pool's pack, which all layers read without a copy. d_pool (L, P), in any dtype, stays apart:
    folding it into the pack would need a copy for each layer. All three are None if there is no
    pool or the packs contain it; V then has no elements.
    """
    y = x.new_empty((*x.shape[:2], Bp.shape[2]))
    for layer, weight in enumerate(weights):
        torch.mm(x[layer], weight.t(), out=y[layer])
    if bias is not None:
        y += bias[:, None]
    U, V = torch.bmm(x, Ap.transpose(1, 2)), x.new_empty(0)
    y.baddbmm_(U, Bp)
    if Ap_pool is not None and Bp_pool is not None and d_pool is not None:
        # One product over the tokens of all layers reads the pool once.
        V = torch.matmul(x, Ap_pool.t())
        y.flatten(0, 1).addmm_((V * d_pool[:, None].to(x.dtype)).flatten(0, 1), Bp_pool)
    return y, U, V


@operator(
    "linear_group_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor U, Tensor V, "
    "Tensor Ap, Tensor Bp, Tensor? Ap_pool, Tensor? Bp_pool, Tensor? d_pool, bool need_x, "
    "bool need_adapter) -> (Tensor dx, Tensor dAp, Tensor dBp, Tensor dAp_pool, Tensor dBp_pool, "
    "Tensor dd_pool)"
)
def linear_group_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    U: Tensor,
    V: Tensor,
    Ap: Tensor,
    Bp: Tensor,
    Ap_pool: Tensor | None,
    Bp_pool: Tensor | None,
    d_pool: Tensor | None,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dX = G W + H Ap + K Ap_pool, dAp = H^T X, dBp = U^T G and the pool's gradients.

    H = G Bp^T and K = G Bp_pool^T diag(d). Gradients of the pool's pack are summed over the layers
    by one product over all tokens: dAp_pool (P, in) = K^T X, dBp_pool (P, out) = (V diag(d))^T G;
    dd_pool is (L, P). dAp (L, Rp, in), dBp (L, Rp, out) and the pool's gradients have the
    accumulation dtype.
    """
    wide, width = accumulation_dtype(x.dtype), x.shape[2]
    pooled = 0 if Ap_pool is None else Ap_pool.shape[0]
    K = S = x.new_empty((*x.shape[:2], 0))
    dd = x.new_empty((x.shape[0], 0), dtype=wide)
    if Bp_pool is not None and d_pool is not None:
        K = torch.matmul(grad, Bp_pool.t())
        dd = (V * K).sum(1, dtype=wide)
        d = d_pool[:, None].to(x.dtype)
        K, S = K * d, V * d
    H = torch.bmm(grad, Bp.transpose(1, 2))
    dx = x.new_empty(x.shape if need_x else (0,))
    if need_x:
        for layer, weight in enumerate(weights):
            torch.mm(grad[layer], weight, out=dx[layer])
        dx.baddbmm_(H, Ap)
        if Ap_pool is not None:
            dx.flatten(0, 1).addmm_(K.flatten(0, 1), Ap_pool)
    if not need_adapter:
        a, b, c, d, e = (x.new_empty(0, dtype=wide) for _ in range(5))
        return dx, a, b, c, d, e
    dAp = torch.bmm(H.transpose(1, 2), x).to(wide)
    dBp = torch.bmm(U.transpose(1, 2), grad).to(wide)
    dAp_pool, dBp_pool = x.new_empty((0, width)), grad.new_empty((0, grad.shape[2]))
    if pooled:
        dAp_pool = torch.mm(K.flatten(0, 1).t(), x.flatten(0, 1))
        dBp_pool = torch.mm(S.flatten(0, 1).t(), grad.flatten(0, 1))
    return dx, dAp, dBp, dAp_pool.to(wide), dBp_pool.to(wide), dd
