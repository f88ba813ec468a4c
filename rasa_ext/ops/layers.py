"""Operators over the packs of L layers of equal shape.

Tensors are stacked along a new first dimension. See ``linear`` for a single layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext.ops.library import accumulation_dtype, operator


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
    "linear_group(Tensor x, Tensor[] weights, Tensor? bias, Tensor Ap, Tensor Bp) -> "
    "(Tensor y, Tensor U)"
)
def linear_group(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, Ap: Tensor, Bp: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute Y_l = x_l W_l^T + bias_l + U_l Bp_l for x (L, M, in), and U_l = x_l Ap_l^T.

    y (L, M, out), U (L, M, Rp). Ap (L, Rp, in) and Bp (L, Rp, out) are packs, and bias is (L, out).
    """
    y = x.new_empty((*x.shape[:2], Bp.shape[2]))
    for layer, weight in enumerate(weights):
        torch.mm(x[layer], weight.t(), out=y[layer])
    if bias is not None:
        y += bias[:, None]
    U = torch.bmm(x, Ap.transpose(1, 2))
    y.baddbmm_(U, Bp)
    return y, U


@operator(
    "linear_group_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor U, Tensor Ap, "
    "Tensor Bp, bool need_x, bool need_adapter) -> (Tensor dx, Tensor dAp, Tensor dBp)"
)
def linear_group_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    U: Tensor,
    Ap: Tensor,
    Bp: Tensor,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dX = G W + H Ap, dAp = H^T X and dBp = U^T G, with H = G Bp^T.

    dAp (L, Rp, in) and dBp (L, Rp, out) have the accumulation dtype. A result that is not needed
    has no elements.
    """
    wide = accumulation_dtype(x.dtype)
    H = torch.bmm(grad, Bp.transpose(1, 2))
    dx = x.new_empty(x.shape if need_x else (0,))
    if need_x:
        for layer, weight in enumerate(weights):
            torch.mm(grad[layer], weight, out=dx[layer])
        dx.baddbmm_(H, Ap)
    if not need_adapter:
        return dx, x.new_empty(0, dtype=wide), x.new_empty(0, dtype=wide)
    dAp = torch.bmm(H.transpose(1, 2), x).to(wide)
    return dx, dAp, torch.bmm(U.transpose(1, 2), grad).to(wide)
