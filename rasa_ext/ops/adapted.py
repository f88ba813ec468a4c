"""An adapted linear in two calls: one for the forward, one for the whole backward.

Each call replaces several (``pack`` and ``low_rank_linear`` or ``low_rank_add``), because a call
from Python costs as much as a product of a few tokens.

Symbols and shapes are as in ``pack`` and ``linear``; the factors are A, A_pool, B, B_pool and d.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rasa_ext.ops.library import operator
from rasa_ext.ops.linear import linear, linear_add, linear_grads
from rasa_ext.ops.pack import as_results, factor_grads, packed, with_own_memory


@operator(
    "adapted_linear(Tensor? y, Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor? A_pool, "
    "Tensor B, Tensor? B_pool, Tensor? d, int multiple=1, Tensor? x_dropped=None, "
    "float scale=1.0) -> "
    "(Tensor out, Tensor U)"
)
def adapted_linear(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor | None,
    multiple: int = 1,
    x_dropped: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return X W^T + bias + U Bp (M, out), or y + U Bp if y replaces the weight, and U.

    U = X Ap^T (M, Rp), with the pack in x's dtype.
    """
    Ap, Bp = packed(A, A_pool, B, B_pool, d, x.dtype, multiple)
    if weight is not None and y is None:
        return linear(x, weight, bias, Ap, Bp, x_dropped, scale)
    if y is not None and weight is None:
        return linear_add(y, x, Ap, Bp, x_dropped, scale)
    got = "both" if weight is not None else "None for both"
    raise ValueError(
        f"rasa_ext::adapted_linear: weight: expected a tensor, or y in its place, got {got}."
    )


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    U: Tensor | None,
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor | None,
    multiple: int,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``adapted_linear``'s x (M, in) and factors.

    A gradient that is not needed has no elements. ``weight=None`` is the backward of ``y + U Bp``.
    The pack is rebuilt from the factors. Gradients of the factors have the factors' dtype; dB
    (out, r-k) and dB_pool (out, L*k) are stored by ranks.
    """
    Ap, Bp = packed(A, A_pool, B, B_pool, d, grad.dtype, multiple)
    dx, dAp, dBp = linear_grads(grad, x, weight, U, Ap, Bp, need_x, need_A, need_B, mask, scale)
    grads = factor_grads(dAp, dBp, B, B_pool, d)
    return grad.new_empty(0) if dx is None else dx, *as_results(B, grads)


def _registered(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    dx, *grads = _gradients(*args, **kwargs)
    return dx, *with_own_memory(*grads)


adapted_linear_backward = operator(
    "adapted_linear_backward(Tensor grad, Tensor? x, Tensor? weight, Tensor? U, "
    "Tensor A, Tensor? A_pool, Tensor B, Tensor? B_pool, Tensor? d, int multiple, bool need_x, "
    "bool need_A, bool need_B, Tensor? mask=None, float scale=1.0) -> "
    "(Tensor dx, Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)",
    kernel=_registered,
)(_gradients)
