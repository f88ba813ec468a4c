"""The base class of the package's autograd functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with a typed ``apply``."""

    if TYPE_CHECKING:  # torch's apply has no types

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tensor:
            """Run the forward, and record the backward for autograd."""
