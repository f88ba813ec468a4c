"""Autograd functions for adapted linears over packs.

    low_rank_linear(x, W, ...)        -> x W^T + bias + (x Ap^T) Bp
    adapted_projections(x, Ws, ...)   -> low_rank_linear of every layer that reads one x
    adapted_group(x, Ws, bias, ...)   -> low_rank_linear of L layers on L given inputs

The backward saves the pack, x only if an A is trained, and U = x Ap^T only if a B or d is trained.
Dropout adds a mask of one bit for each element of x. Gradients of the functions are first order.
Where PyTorch differentiates the products instead, they can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rasa_ext import ops
from rasa_ext.nn.adapter import Packed
from rasa_ext.nn.function import Function, first_order, is_transformed
from rasa_ext.nn.packs import pack_alone, pack_layers, ports
from rasa_ext.ops import Factors

_unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default

_Grads: TypeAlias = "tuple[Tensor | None, ...]"


class Dropped(NamedTuple):
    """Dropout of a linear's input, from ``dropout``; the default is none."""

    mask: Tensor | None = None
    """uint8 (ceil(x.numel() / 8),); for a transformed call, factors of x's shape and dtype."""
    scale: float = 1.0


NO_DROPOUT = Dropped()


class _LowRankLinear(Function):
    """An adapted linear over ``weight``, or over ``y``, the output of any other base."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        Ap: Tensor,
        Bp: Tensor,
        Ap_port: Tensor | None,
        Bp_port: Tensor | None,
    ) -> Tensor:
        out, U = _forward(y, x, weight, bias, mask, scale, Ap, Bp)
        need_A, need_B = ctx.needs_input_grad[8:]
        ctx.save_for_backward(x if need_A else None, weight, U if need_B else None, mask, Ap, Bp)
        ctx.scale, ctx.width = scale, x.shape[-1]
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        x, weight, U, mask, Ap, Bp = ctx.saved_tensors
        need_y, need_x, *_, need_A, need_B = ctx.needs_input_grad
        dx, dAp, dBp = ops.low_rank_linear_backward(
            _flatten(grad),
            None if x is None else _flatten(x),
            weight,
            U,
            Ap,
            Bp,
            need_x,
            need_A,
            need_B,
            mask,
            ctx.scale,
        )
        return (
            grad if need_y else None,
            dx.view((*grad.shape[:-1], ctx.width)) if need_x else None,
            *(None,) * 6,
            dAp if need_A else None,
            dBp if need_B else None,
        )


def _forward(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    Ap: Tensor,
    Bp: Tensor,
    linear: Callable[..., tuple[Tensor, Tensor]] = ops.low_rank_linear,
    add: Callable[..., tuple[Tensor, Tensor]] = ops.low_rank_add,
) -> tuple[Tensor, Tensor]:
    rows = _flatten(x)
    if y is not None:
        out, U = add(_flatten(y), rows, Ap, Bp, mask, scale)
    else:
        out, U = linear(rows, weight, bias, Ap, Bp, mask, scale)
    return _unflatten(out, x), U


class _AdaptedProjections(Function):
    """Adapted projections: n weights, biases, Ap, Bp and ports of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, n: int, mask: Tensor | None, scale: float, *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, Bp, *_ = _lists(tensors, n)
        Ap = torch.cat(downs)
        rows = _flatten(x)
        y, U = ops.linear_projections(rows, weights, _as_op_list(biases), Ap, Bp, mask, scale)
        needs = ctx.needs_input_grad[4 + 4 * n :]
        ctx.needs = any(needs[:n]), any(needs[n:])
        ctx.save_for_backward(
            x if ctx.needs[0] else None, U if ctx.needs[1] else None, mask, Ap, *weights, *Bp
        )
        ctx.scale, ctx.width = scale, x.shape[-1]
        return tuple(_unflatten(output, x) for output in y)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        x, U, mask, Ap, *tensors = ctx.saved_tensors
        n = len(grads)
        weights, Bp = _lists(tensors, n)
        need_x, (need_A, need_B) = ctx.needs_input_grad[0], ctx.needs
        dx, dAp, dBp = ops.linear_projections_backward(
            [_flatten(grad) for grad in grads],
            None if x is None else _flatten(x),
            weights,
            U,
            Ap,
            Bp,
            need_x,
            need_A,
            need_B,
            mask,
            ctx.scale,
        )
        downs = dAp.split([len(up) for up in Bp]) if need_A else [None] * n
        ups = dBp if need_B else [None] * n
        needs = ctx.needs_input_grad[4 + 4 * n :]
        wanted = (g if need else None for g, need in zip((*downs, *ups), needs, strict=True))
        dx_shaped = dx.view((*grads[0].shape[:-1], ctx.width)) if need_x else None
        return dx_shaped, *(None,) * (3 + 4 * n), *wanted


class _AdaptedGroup(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, Ap: Tensor, Bp: Tensor, *tensors: Tensor
    ) -> Tensor:
        weights = list(tensors[: len(x)])
        y, U = ops.linear_group(x, weights, bias, Ap, Bp)
        ctx.save_for_backward(x, U, Ap, Bp, *weights)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        x, U, Ap, Bp, *weights = ctx.saved_tensors
        need_x, *_ = ctx.needs_input_grad
        needs = ctx.needs_input_grad[4 + len(weights) :]
        dx, dAp, dBp = ops.linear_group_backward(grad, x, weights, U, Ap, Bp, need_x, any(needs))
        grads = (*dAp, *dBp) if any(needs) else (None,) * len(needs)
        wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx if need_x else None, *(None,) * (3 + len(weights)), *wanted


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pack: Packed,
    dropped: Dropped = NO_DROPOUT,
    y: Tensor | None = None,
) -> Tensor:
    """Compute ``x W^T + bias + x dW^T`` with dW = Bp^T Ap.

    For a base that is not a plain GEMM, ``y + x dW^T``. Differentiable in x and y; the gradients of
    the pack go to the ports.

    Args:
        x: (..., in).
        weight: (out, in) with any strides; gets no gradient.
        bias: (out,) or None; gets no gradient.
        pack: Ap (Rp, in) and Bp (Rp, out). x, weight, bias and the pack have one dtype.
        dropped: from ``dropout``, if the adapter's input is dropped.
        y: output (..., out) of the base, in x's dtype; weight and bias are then None.

    Returns:
        (..., out); y is not changed.
    """
    if is_transformed():
        return _plain(y, x, weight, bias, pack, dropped)
    if torch.is_grad_enabled():
        if dropped.mask is None and ops.differentiates_products(x):
            Ap, Bp = (
                p if port is None else port for p, port in zip(pack[:2], pack[2:], strict=True)
            )
            return _forward(y, x, weight, bias, *dropped, Ap, Bp, ops.linear, ops.linear_add)[0]
        return _LowRankLinear.apply(y, x, weight, bias, *dropped, *pack)
    return _forward(y, x, weight, bias, dropped.mask, dropped.scale, pack.Ap, pack.Bp)[0]


def _plain(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pack: Packed,
    dropped: Dropped,
) -> Tensor:
    """Compute ``low_rank_linear`` by operations that torch.func transforms and jit records."""
    if y is None:
        assert weight is not None
        y = torch.nn.functional.linear(x, weight, bias)
    if dropped.mask is not None:
        x = x * dropped.mask
    return y + x @ pack.Ap.mT @ pack.Bp


def adapted_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    packs: Sequence[Packed],
    dropped: Dropped = NO_DROPOUT,
) -> tuple[Tensor, ...]:
    """Compute ``low_rank_linear`` of n layers that read one x, with one down-projection for all.

    The layers may differ in rank and output width. The backward sums the gradients with respect to
    x inside the products. Differentiable as ``low_rank_linear``, where the arguments are explained.
    """
    tensors = (*weights, *biases, *(t for kind in zip(*packs, strict=True) for t in kind))
    return tuple(_AdaptedProjections.apply(x, len(weights), *dropped, *tensors))


def adapted_group(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    A: Sequence[Tensor],
    A_pool: Tensor | None,
    B: Sequence[Tensor],
    B_pool: Tensor | None,
    d: Sequence[Tensor],
) -> Tensor:
    """Compute the adapted linears of the L layers of one group, each on its own x.

    For layers whose inputs are all known: distillation, layerwise reconstruction, experts. The
    products of all layers are batched, so that layers with few tokens fill a device together. The
    pool's gradients are summed over the layers.

    Args:
        x: (L, M, in).
        weights: one (out, in) for each layer, with any strides; get no gradients.
        bias: one (out,) for each layer, or None.
        A, B, d: one tensor for each layer: A (r-k, in), B (out, r-k) and d (R,) with R = r-k+L*k.
        A_pool, B_pool: the group's pool, (L*k, in) and (out, L*k), or None.

    Returns:
        (L, M, out). Differentiable in x and in the factors.

    Raises:
        ValueError: x is not (L, M, in), or a list does not have one tensor for each layer.

    Example:
        >>> from rasa_ext.nn import adapted_group
        >>> x, W = torch.randn(2, 5, 4), [torch.randn(3, 4) for _ in range(2)]  # two layers
        >>> A, B, d = torch.randn(2, 1, 4), torch.randn(2, 3, 1), torch.randn(2, 3)
        >>> A_pool, B_pool = torch.randn(2, 4), torch.randn(3, 2)
        >>> y = adapted_group(x, W, None, list(A), A_pool, list(B), B_pool, list(d))
        >>> dW = torch.cat([B[0], B_pool], 1) @ d[0].diag() @ torch.cat([A[0], A_pool])
        >>> torch.allclose(y[0], x[0] @ (W[0] + dW).T, atol=1e-4)
        True
    """
    lists = {"weights": weights, "A": A, "B": B, "d": d}
    if bias is not None:
        lists["bias"] = bias
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(
            "x: expected (L, M, in) for at least one layer, stacked as torch.stack does, got "
            f"shape {tuple(x.shape)}."
        )
    for name, tensors in lists.items():
        if len(tensors) != x.shape[0]:
            raise ValueError(
                f"{name}: expected {x.shape[0]} tensors, one per layer of x, got {len(tensors)}."
            )
    stacked = None if bias is None else torch.stack(list(bias)).detach()
    factors = [Factors(a, A_pool, b, B_pool, v) for a, b, v in zip(A, B, d, strict=True)]
    if is_compiling():
        packs = [pack_alone(of_layer, x.dtype) for of_layer in factors]
        downs, ups, Ap_ports, Bp_ports = zip(*packs, strict=True)
        Ap, Bp = torch.stack(downs), torch.stack(ups)
    else:
        Ap, Bp = pack_layers(factors, x.dtype)
        Ap_ports, Bp_ports = zip(*ports((Ap, Bp), factors), strict=True)
    return _AdaptedGroup.apply(x, stacked, Ap, Bp, *weights, *Ap_ports, *Bp_ports)


def dropout(x: Tensor, p: float) -> Dropped:
    """Draw dropout of x (..., in) for the linears, with the scale 1 / (1 - p).

    The mask comes from torch's generator of x's device, so that ``manual_seed`` and checkpointing
    reproduce it. No call waits for the device. Raises ValueError or RuntimeError if p is not in
    [0, 1).
    """
    if p == 0:
        return NO_DROPOUT
    if is_transformed():
        return Dropped(torch.nn.functional.dropout(torch.ones_like(x), p))
    words = ops.noise_words(x.device.type, x.numel())
    noise = torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, device=x.device)
    return Dropped(ops.dropout(noise, _flatten(x.detach()), p), 1 / (1 - p))


def _as_op_list(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Replace None for an operator: return [] if all are None, else empty tensors for None."""
    some = next((t for t in tensors if t is not None), None)
    return [] if some is None else [some.new_empty(0) if t is None else t for t in tensors]


def _lists(tensors: Sequence[Any], layers: int) -> list[list[Any]]:
    """Split tensors that are ordered by kind into one list for each kind."""
    return [list(tensors[at : at + layers]) for at in range(0, len(tensors), layers)]


def _flatten(x: Tensor) -> Tensor:
    """Reshape x (..., n) to (M, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflatten(y: Tensor, x: Tensor) -> Tensor:
    """Reshape y (M, n) to (..., n) with x's leading dimensions; do not use y afterwards.

    To autograd the result is not a view: a view returned by a Function cannot be modified in place.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
