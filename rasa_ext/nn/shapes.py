"""Conversion of activations (..., n) to matrices (M, n) with one row for each token, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default


def flatten_tokens(x: Tensor) -> Tensor:
    """Reshape x (..., n) to (M, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unflatten_like(y: Tensor, x: Tensor) -> Tensor:
    """Reshape y (M, n) to (..., n) with x's leading dimensions; do not use y afterwards.

    To autograd the result is not a view: a view returned by a Function cannot be modified in place.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
