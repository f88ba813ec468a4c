"""Low-rank linears of n projections of one x, such as q, k and v, computed together.

The ranks are concatenated: Rp = sum of Rp_i. Lists have one entry for each projection, or are
empty if no projection has such a tensor; a bias without elements means no bias. See ``linear`` for
a single projection. With dropout, all projections share one mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext.ops.dropout import keep, project, unpacked
from rasa_ext.ops.library import accumulation_dtype, operator
from rasa_ext.ops.linear import input_grad, with_base


@operator(
    "linear_projections(Tensor x, Tensor[] weights, Tensor[] biases, Tensor Ap, Tensor[] Bp, "
    "Tensor? mask=None, float scale=1.0) -> (Tensor[] y, Tensor U)"
)
def linear_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    Ap: Tensor,
    Bp: Sequence[Tensor],
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """Compute Y_i = X W_i^T + bias_i + U_i Bp_i (M, out_i), U_i being columns of U = X Ap^T."""
    U = project(x, Ap, mask, scale)
    y = []
    for i, (weight, up, u) in enumerate(zip(weights, Bp, _columns(U, Bp), strict=True)):
        bias = biases[i] if biases and biases[i].numel() else None
        y.append(with_base(x, weight, bias, u, up))
    return y, U


@operator(
    "linear_projections_backward(Tensor[] grads, Tensor? x, Tensor[] weights, Tensor? U, "
    "Tensor Ap, Tensor[] Bp, bool need_x, bool need_A, bool need_B, Tensor? mask=None, "
    "float scale=1.0) -> (Tensor dx, Tensor dAp, Tensor[] dBp)"
)
def linear_projections_backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    U: Tensor | None,
    Ap: Tensor,
    Bp: Sequence[Tensor],
    need_x: bool,
    need_A: bool,
    need_B: bool,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute dX = sum_i G_i W_i + H Ap, dAp = H^T X and dBp_i = U_i^T G_i, with H_i = G_i Bp_i^T.

    H (M, Rp) concatenates the H_i. Arguments and dtypes are as in ``low_rank_linear_backward``;
    dBp is an empty list if not needed.
    """
    like = grads[0]
    wide = accumulation_dtype(like.dtype)
    dx = dAp = None
    dBp: list[Tensor] = []
    if (need_A and x is None) or (need_B and U is None):
        raise ValueError(
            "rasa_ext::linear_projections_backward: expected x for need_A, U for need_B, got None."
        )
    if need_B and U is not None:
        for grad, u in zip(grads, _columns(U, Bp), strict=True):
            dBp.append(torch.mm(u.t(), grad).to(wide))
    if need_x or need_A:
        H = like.new_empty((like.shape[0], Ap.shape[0]))
        for grad, up, h in zip(grads, Bp, _columns(H, Bp), strict=True):
            torch.mm(grad, up.t(), out=h)
        bits = None
        if mask is not None:
            H.mul_(scale)
            bits = unpacked(mask, like, (like.shape[0], Ap.shape[1]))
        if need_A and x is not None:
            dAp = torch.mm(H.t(), x if bits is None else keep(x, bits)).to(wide)
        if need_x:
            dx = input_grad(grads, weights, H, Ap, bits)
    return (
        like.new_empty(0) if dx is None else dx,
        like.new_empty(0, dtype=wide) if dAp is None else dAp,
        dBp,
    )


def _columns(U: Tensor, Bp: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split U (M, Rp) into each projection's columns."""
    return U.split_with_sizes([up.shape[0] for up in Bp], 1)
