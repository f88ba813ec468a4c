"""Adapted linears of few tokens on a CPU: PyTorch operations, which PyTorch differentiates.

What ``nn.functional`` computes, for where ``ops.few_tokens`` says so. The time of few tokens is
that of small operations, and of Python around them in caches which the large products have emptied:
every function called here is seen in a step, and a backward has no Python at all. d goes to the
tokens, V = U diag(d), and its gradient is a sum over (M, R) in place of passes over (R, out). Kept
for the backward are x, U, V, d and the pack without it, as much as the official formula keeps, and
as there each is rounded for itself in low precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rasa_ext.nn.shapes import flatten_tokens, unflatten_like
from rasa_ext.ops import Factors
from rasa_ext.ops.heuristics import ranks_first
from rasa_ext.ops.linear import with_base


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """Compute x W^T + bias + x dW^T (..., out)."""
    rows = flatten_tokens(x)
    V, up = _projected(rows, factors)
    return unflatten_like(with_base(rows, weight, bias, V, up), x)


def adapted_add(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """Compute y + x dW^T (..., out)."""
    V, up = _projected(flatten_tokens(x), factors)
    return unflatten_like(torch.addmm(flatten_tokens(y), V, up), y)


def adapted_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Sequence[Factors],
) -> tuple[Tensor, ...]:
    """Compute ``adapted_linear`` of layers that read one x, with one down-projection for all."""
    rows, dtype, ranks = flatten_tokens(x), x.dtype, [each.rank for each in factors]
    Ap = torch.cat([t for each in factors for t in (each.A, each.A_pool) if t is not None])
    U = _down(rows, Ap if Ap.dtype == dtype else Ap.to(dtype))
    V = U
    if any(each.d is not None for each in factors):
        its = [each.A.new_ones(each.rank) if each.d is None else each.d for each in factors]
        V = U * torch.cat(its).to(dtype)
    outputs = []
    for weight, bias, v, each in zip(weights, biases, V.split(ranks, 1), factors, strict=True):
        B, B_pool = each.B, each.B_pool
        up = B.t() if B_pool is None else torch.cat((B.t(), B_pool.t()))
        y = with_base(rows, weight, bias, v, up if up.dtype == dtype else up.to(dtype))
        outputs.append(unflatten_like(y, x))
    return tuple(outputs)


def _projected(rows: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Give V = x Ap^T diag(d) (M, R) and [B | B_pool]^T (R, out)."""
    A, A_pool, B, B_pool, d = factors
    dtype, down, up = rows.dtype, A, B.t()
    if A_pool is not None and B_pool is not None:
        down, up = torch.cat((A, A_pool)), torch.cat((up, B_pool.t()))
    if not down.dtype == up.dtype == dtype:
        down, up = down.to(dtype), up.to(dtype)
    U = _down(rows, down)
    return U if d is None else U * d.to(dtype), up


def _down(rows: Tensor, Ap: Tensor) -> Tensor:
    """Compute U = x Ap^T (M, R); its strides are those of V, and of both their gradients."""
    return torch.mm(Ap, rows.t()).t() if ranks_first(rows) else linear(rows, Ap)
