"""Adapted linears on a CPU, composed of PyTorch operations, which PyTorch differentiates.

What ``nn.functional`` computes, for where ``ops.torch_differentiates``. What an adapter takes there
beside its products is small operations, and Python around them in caches which the large products
have emptied: every function called here is seen in a step, and a backward has no Python at all.

With few tokens (``d_on_tokens``) d goes to them, V = U diag(d), and its gradient is a sum over
(M, R) in place of passes over (R, out). Kept for the backward are x, U, V, d and the pack without
it, as much as the official formula keeps, and as there each is rounded for itself in low precision.
With many d is in the pack, and x, U and the pack are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rasa_ext.nn.shapes import flatten_tokens, unflatten_like
from rasa_ext.ops import Factors
from rasa_ext.ops.heuristics import d_on_tokens, ranks_first
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
    V = _down(rows, Ap if Ap.dtype == dtype else Ap.to(dtype))
    on_tokens = d_on_tokens(rows)
    if on_tokens and any(each.d is not None for each in factors):
        its = [each.A.new_ones(each.rank) if each.d is None else each.d for each in factors]
        V = V * torch.cat(its).to(dtype)
    outputs = []
    for weight, bias, v, each in zip(weights, biases, V.split(ranks, 1), factors, strict=True):
        up = _up(each, not on_tokens)
        y = with_base(rows, weight, bias, v, up if up.dtype == dtype else up.to(dtype))
        outputs.append(unflatten_like(y, x))
    return tuple(outputs)


def _projected(rows: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Give x Ap^T (M, R) and [B | B_pool]^T (R, out), one of them multiplied by diag(d)."""
    A, A_pool, _, _, d = factors
    on_tokens = d_on_tokens(rows)
    dtype, down, up = rows.dtype, A, _up(factors, not on_tokens)
    if A_pool is not None:
        down = torch.cat((A, A_pool))
    if not down.dtype == up.dtype == dtype:
        down, up = down.to(dtype), up.to(dtype)
    U = _down(rows, down)
    return U if d is None or not on_tokens else U * d.to(dtype), up


def _up(factors: Factors, with_d: bool) -> Tensor:
    """Give [B | B_pool]^T (R, out), or Bp = diag(d) [B | B_pool]^T, in the parameters' dtype."""
    _, _, B, B_pool, d = factors
    rows = [B.t()] if B_pool is None else [B.t(), B_pool.t()]
    if with_d and d is not None:
        # Each with its own part, so that nothing but parameters is kept for d's gradient.
        its = d.unsqueeze(1).split([len(each) for each in rows])
        rows = [each * v for each, v in zip(rows, its, strict=True)]
    return rows[0] if B_pool is None else torch.cat(rows)


def _down(rows: Tensor, Ap: Tensor) -> Tensor:
    """Compute U = x Ap^T (M, R); its strides are those of V, and of both their gradients."""
    return torch.mm(Ap, rows.t()).t() if ranks_first(rows) else linear(rows, Ap)
