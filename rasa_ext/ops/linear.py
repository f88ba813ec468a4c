"""The low-rank linear over a pack, and the backward.

Symbols: M tokens, ``in``/``out`` features, Rp the pack's rows. x and grad are 2-D; the caller
flattens them. Within one call all tensors but the mask have one dtype.

Dropout affects the adapter's input only: wherever x is multiplied with Ap, it is ``scale`` times
the masked x. ``mask`` has one bit for each element of x (see ``dropout``). The scale is folded into
U and H, so that low precision rounds no element of x again. U includes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from rasa_ext.ops.dropout import integers, keep, project, unpacked
from rasa_ext.ops.heuristics import adapter_first
from rasa_ext.ops.library import accumulation_dtype, operator


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    Ap: Tensor,
    Bp: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute Y = X W^T + bias + U Bp (M, out) and U = X Ap^T (M, Rp)."""
    U = project(x, Ap, mask, scale)
    return with_base(x, weight, bias, U, Bp), U


def with_base(x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, Bp: Tensor) -> Tensor:
    """Compute X W^T + bias + U Bp (M, out); ``adapter_first`` decides which product comes first."""
    if adapter_first(x):
        y = torch.mm(U, Bp) if bias is None else torch.addmm(bias, U, Bp)
        return y.addmm_(x, weight.t())
    return dense(x, weight, bias).addmm_(U, Bp)


low_rank_linear = operator(
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor Ap, Tensor Bp, "
    "Tensor? mask=None, float scale=1.0) -> (Tensor y, Tensor U)"
)(linear)


def linear_add(
    y: Tensor, x: Tensor, Ap: Tensor, Bp: Tensor, mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute y + U Bp (M, out) and U = X Ap^T (M, Rp), for a base that is not a plain GEMM."""
    U = project(x, Ap, mask, scale)
    return torch.addmm(y, U, Bp), U


low_rank_add = operator(
    "low_rank_add(Tensor y, Tensor x, Tensor Ap, Tensor Bp, Tensor? mask=None, "
    "float scale=1.0) -> (Tensor out, Tensor U)"
)(linear_add)


@operator(
    "low_rank_linear_backward(Tensor grad, Tensor? x, Tensor? weight, Tensor? U, Tensor Ap, "
    "Tensor Bp, bool need_x, bool need_A, bool need_B, Tensor? mask=None, float scale=1.0) -> "
    "(Tensor dx, Tensor dAp, Tensor dBp)"
)
def low_rank_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    U: Tensor | None,
    Ap: Tensor,
    Bp: Tensor,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dX = G W + H Ap, dAp = H^T X and dBp = U^T G, with H = G Bp^T.

    ``weight=None`` is the backward of ``low_rank_add``. Only dAp needs x, and only dBp needs U.
    dAp (Rp, in) and dBp (Rp, out) have the accumulation dtype: float32, or float64 for float64.
    A result that is not needed has no elements.
    """
    dx = dAp = dBp = None
    if (need_A and x is None) or (need_B and U is None):
        raise ValueError("rasa_ext: expected x for need_A and U for need_B, got None.")
    if need_B and U is not None:
        dBp = torch.mm(U.t(), grad)
    if need_x or need_A:
        H = project(grad, Bp, None, 1.0)
        bits = None
        if mask is not None:
            H.mul_(scale)
            bits = unpacked(mask, grad, (grad.shape[0], Ap.shape[1]))
        if need_A and x is not None:
            dAp = torch.mm(H.t(), x if bits is None else keep(x, bits))
        if need_x and (weight is None or adapter_first(grad)):
            dx = torch.mm(H, Ap)
            if bits is not None:
                integers(dx).bitwise_and_(bits)
            if weight is not None:
                dx.addmm_(grad, weight)
        elif need_x and weight is not None:
            dx = torch.mm(grad, weight)
            dx = dx.addmm_(H, Ap) if bits is None else dx.add_(keep(torch.mm(H, Ap), bits))
    wide = accumulation_dtype(grad.dtype)
    return (
        grad.new_empty(0) if dx is None else dx,
        grad.new_empty(0, dtype=wide) if dAp is None else dAp.to(wide),
        grad.new_empty(0, dtype=wide) if dBp is None else dBp.to(wide),
    )
