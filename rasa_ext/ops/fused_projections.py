"""Low-rank linears of n projections of one x, such as q, k and v, computed together.

The ranks are concatenated: Rp = sum of Rp_i. Lists have one entry for each projection, or are
empty if no projection has such a tensor; a bias without elements means no bias. See ``linear`` for
a single projection. With dropout, all projections share one mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rasa_ext.ops.dropout import project
from rasa_ext.ops.library import operator
from rasa_ext.ops.linear import low_rank_linear_backward, with_base


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
    columns = U.split([len(up) for up in Bp], 1)
    for i, (weight, up, u) in enumerate(zip(weights, Bp, columns, strict=True)):
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
    ranks = [len(up) for up in Bp]
    of_U = [None] * len(Bp) if U is None else U.split(ranks, 1)
    parts = zip(grads, weights, of_U, Ap.split(ranks), Bp, strict=True)
    needs = need_x, need_A, need_B
    grads_of_layers = [
        low_rank_linear_backward(G, x, W, u, down, up, *needs, mask, scale)
        for G, W, u, down, up in parts
    ]
    dx, dAp, dBp = zip(*grads_of_layers, strict=True)
    return sum(dx[1:], dx[0]), torch.cat(dAp), list(dBp) if need_B else []
