"""Adapted linears on a CPU: plain PyTorch operations, which PyTorch differentiates.

They replace ``nn.functional`` if ``ops.torch_differentiates``. Besides the GEMMs, the cost on a CPU
is Python overhead and small ops with cold caches; PyTorch's backward runs no Python. The backward
saves x, U and the pack.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from rasa_ext.nn.shapes import flatten_tokens, unflatten_like
from rasa_ext.ops import Factors
from rasa_ext.ops.linear import with_base


def adapted_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Factors, y: Tensor | None = None
) -> Tensor:
    """Compute x W^T + bias + x dW^T (..., out), or y + x dW^T if y is given."""
    if factors.A.element_size() < x.element_size():  # B diag(d) is rounded to x's dtype
        factors = Factors._make(t if t is None else t.to(x.dtype) for t in factors)
    A, A_pool, B, B_pool, d = factors
    downs = [A] if A_pool is None else [A, A_pool]
    ups = [B.t()] if B_pool is None else [B.t(), B_pool.t()]
    if d is not None:
        # Scale B and B_pool apart, so that only parameters are saved for d's gradient.
        parts = d.unsqueeze(1).split([len(each) for each in ups])
        ups = [each * part for each, part in zip(ups, parts, strict=True)]
    rows = flatten_tokens(x)
    Ap, Bp = (each[0] if A_pool is None else torch.cat(each) for each in (downs, ups))
    if not Ap.dtype == Bp.dtype == x.dtype:
        Ap, Bp = Ap.to(x.dtype), Bp.to(x.dtype)
    U = linear(rows, Ap)
    if y is not None:
        return unflatten_like(torch.addmm(flatten_tokens(y), U, Bp), x)
    assert weight is not None
    return unflatten_like(with_base(rows, weight, bias, U, Bp), x)
