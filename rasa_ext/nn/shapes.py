"""Activations (..., n) as matrices (M, n), one row a token, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default


def count_tokens(x: Tensor) -> int:
    """Give M, the tokens in x (..., n)."""
    return x.numel() // max(x.shape[-1], 1)


def flatten_tokens(x: Tensor) -> Tensor:
    """Give x (..., n) as (M, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unflatten_like(y: Tensor, x: Tensor) -> Tensor:
    """Give y (M, n), which the caller gives up, as (..., n) with x's leading dimensions.

    Not a view to autograd: what a Function returns as one could not be modified in place.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
