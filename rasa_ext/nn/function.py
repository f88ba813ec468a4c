"""The base class of the package's autograd functions, and what runs without them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with a typed ``apply``."""

    if TYPE_CHECKING:  # torch's apply has no types

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tensor:
            """Run the forward, and record the backward for autograd."""


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward that has no derivative, as ``once_differentiable`` does, but raise early.

    ``torch.autograd.grad`` of the gradients might never visit the node in which
    ``once_differentiable`` raises, and would leave the second order out.
    """
    once: Callable[..., Any] = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if is_compiling():
            return backward(ctx, *grads)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected first derivatives only; second ones are of linear layers "
                "on a CPU in float32 or float64, without dropout."
            )
        return once(ctx, *grads)

    return checked


def is_transformed() -> bool:
    """Return whether torch.func transforms the call, or ``torch.jit.trace`` records it.

    Neither sees through a ``Function``, so layers then compute by plain operations.
    """
    if is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
