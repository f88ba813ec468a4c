"""Autograd functions for adapted linears.

    adapted_linear(x, W, bias, ...)   -> x W^T + bias + (x Ap^T) Bp
    adapted_projections(x, Ws, ...)   -> adapted_linear of every layer that reads one x
    adapted_group(x, Ws, bias, ...)   -> adapted_linear of L layers on L given inputs

The backward saves x, U = x Ap^T and the parameters: x only if an A is trained, U only if a B or d
is trained. It rebuilds the pack, in weight space. Dropout adds a mask of one bit for each element
of x. All gradients are first order; differentiating twice raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rasa_ext import ops
from rasa_ext.nn.shapes import flatten_tokens, unflatten_like
from rasa_ext.ops import Factors

_Grads: TypeAlias = "tuple[Tensor | None, ...]"
_FactorLists: TypeAlias = (
    "tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]"
)
_PoolPack: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None]"


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with a typed ``apply``."""

    if TYPE_CHECKING:  # torch's apply has no types

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            """Run the forward, and record the backward for autograd."""


class _AdaptedLinear(Function):
    """An adapted linear over ``weight``, or over ``y``, the output of any other base."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        multiple: int,
        mask: Tensor | None,
        x_dropped: Tensor | None,
        scale: float,
        A: Tensor,
        A_pool: Tensor | None,
        B: Tensor,
        B_pool: Tensor | None,
        d: Tensor | None,
    ) -> Tensor:
        rows, base = flatten_tokens(x), None if y is None else flatten_tokens(y)
        factors = (A, A_pool, B, B_pool, d)
        out, U = ops.adapted_linear(base, rows, weight, bias, *factors, multiple, x_dropped, scale)
        *_, of_A, of_A_pool, of_B, of_B_pool, of_d = ctx.needs_input_grad
        need_A, need_B = ctx.needs = of_A or of_A_pool, of_B or of_B_pool or of_d
        ctx.save_for_backward(
            x if need_A else None,
            weight,
            U if need_B else None,
            mask,
            *factors,
        )
        ctx.multiple, ctx.scale, ctx.width = multiple, scale, x.shape[-1]
        return unflatten_like(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        x, weight, U, mask, A, A_pool, B, B_pool, d = ctx.saved_tensors
        need_y, need_x, _, _, _, _, _, _, *needs = ctx.needs_input_grad
        need_A, need_B = ctx.needs
        dx, *grads = ops.adapted_linear_backward(
            flatten_tokens(grad),
            None if x is None else flatten_tokens(x),
            weight,
            U,
            A,
            A_pool,
            B,
            B_pool,
            d,
            ctx.multiple,
            need_x,
            need_A,
            need_B,
            mask,
            ctx.scale,
        )
        shape = (*grad.shape[:-1], ctx.width)
        dx_shaped = dx.view(shape) if need_x else None
        own = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return grad if need_y else None, dx_shaped, *(None,) * 6, *own


class _AdaptedProjections(Function):
    """Adapted projections: ``tensors`` are n weights, n biases, and the factors of n layers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        n: int,
        multiple: int,
        mask: Tensor | None,
        x_dropped: Tensor | None,
        scale: float,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        weights, biases, factors = tensors[:n], tensors[n : 2 * n], _by_layer(tensors[2 * n :])
        Ap, Bp = ops.pack_projections(*as_op_lists(factors), x.dtype, multiple)
        x_rows = flatten_tokens(x)
        y, U = ops.linear_projections(x_rows, weights, as_op_list(biases), Ap, Bp, x_dropped, scale)
        ctx.needs = _needs(ctx.needs_input_grad[6 + 2 * n :])
        ctx.save_for_backward(
            x if ctx.needs[0] else None,
            U if ctx.needs[1] else None,
            mask,
            *weights,
            *tensors[2 * n :],
        )
        ctx.multiple, ctx.scale, ctx.width = multiple, scale, x.shape[-1]
        return tuple(unflatten_like(t, x) for t in y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        x, U, mask, *tensors = ctx.saved_tensors
        n = len(grads)
        weights = tensors[:n]
        A, A_pool, B, B_pool, d = as_op_lists(_by_layer(tensors[n:]))
        need_x, (need_A, need_B) = ctx.needs_input_grad[0], ctx.needs
        form = grads[0].dtype, ctx.multiple
        Ap, Bp = ops.pack_projections(A, A_pool, B, B_pool, d, *form)
        shape = (*grads[0].shape[:-1], ctx.width)
        dx, dAp, dBp = ops.linear_projections_backward(
            [flatten_tokens(grad) for grad in grads],
            None if x is None else flatten_tokens(x),
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
        dx_shaped = dx.view(shape) if need_x else None
        own: Iterable[Tensor | None] = (None,) * (5 * n)
        if need_A or need_B:
            downs = dAp.split([up.shape[0] for up in Bp]) if need_A else ()
            kinds = ops.pack_projections_backward(downs, dBp, B, B_pool, d)
            # A tensor without elements means that the gradient was not computed.
            needs = ctx.needs_input_grad[6 + 2 * n :]
            grads_by_layer = chain.from_iterable(zip(*kinds, strict=True))
            own = (g if need else None for g, need in zip(grads_by_layer, needs, strict=True))
        return dx_shaped, *(None,) * (5 + 2 * n), *own


class _AdaptedGroup(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A_pool: Tensor | None,
        B_pool: Tensor | None,
        multiple: int,
        layers: int,
        *tensors: Tensor,
    ) -> Tensor:
        weights, A, B, d = _lists(tensors, layers)
        pack, pool = _pack_group(x, A, A_pool, B, B_pool, d, multiple)
        y, U, V = ops.linear_group(x, weights, bias, *pack, *pool)
        ctx.save_for_backward(x, U, V, A_pool, B_pool, *tensors)
        ctx.multiple, ctx.layers = multiple, layers
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        x, U, V, A_pool, B_pool, *tensors = ctx.saved_tensors
        weights, A, B, d = _lists(tensors, ctx.layers)
        need_x, _, *need = ctx.needs_input_grad
        pack, pool = _pack_group(x, A, A_pool, B, B_pool, d, ctx.multiple)
        dx, dAp, dBp, dAp_pool, dBp_pool, dd_pool = ops.linear_group_backward(
            grad, x, weights, U, V, *pack, *pool, need_x, any(need)
        )
        dx_needed = dx if need_x else None
        frozen = (None,) * ctx.layers
        if not any(need):
            return dx_needed, None, None, None, None, None, *frozen * 4
        if pool[0] is None:
            dA, dA_pool, dB, dB_pool, dd = ops.pack_group_backward(dAp, dBp, B, B_pool, d)
        else:
            own, pooled = B[0].shape[1], B_pool.shape[1]
            d_own = [v[:own] for v in d]
            dA, _, dB, _, dd = ops.pack_group_backward(dAp, dBp, B, None, d_own)
            dA_pool, _, dB_pool, _, _ = ops.pack_backward(dAp_pool, dBp_pool, B_pool, None, None)
            dd = torch.cat((dd, dd_pool[:, :pooled].to(dd.dtype)), 1)
        pools = (None, None) if A_pool is None else (dA_pool, dB_pool)
        return dx_needed, None, *pools, None, None, *frozen, *dA, *dB, *dd


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Factors,
    multiple: int = 1,
    mask: Tensor | None = None,
    x_dropped: Tensor | None = None,
    scale: float = 1.0,
    y: Tensor | None = None,
) -> Tensor:
    """Compute ``x W^T + bias + x dW^T`` with dW = Bp^T Ap, the pack of ``factors``.

    For a base that is not a plain GEMM, ``y + x dW^T``. Differentiable in x, y and the factors.

    Args:
        x: (..., in).
        weight: (out, in) with any strides; gets no gradient.
        bias: (out,) or None; gets no gradient. x, weight and bias have one dtype, in which the
            adapter is computed.
        factors: A (r-k, in), A_pool (L*k, in) or None, B (out, r-k), B_pool (out, L*k) or None and
            d (R,) with R = r-k+L*k, or None for ones. B is best stored by ranks.
        multiple: the pack's rank is rounded up to a multiple of this, with rows of zeros.
        mask, x_dropped, scale: from ``dropout``, if the adapter's input is dropped.
        y: output (..., out) of the base, in x's dtype; weight and bias are then None.

    Returns:
        (..., out); y is not changed.
    """
    out: Tensor = _AdaptedLinear.apply(
        y, x, weight, bias, multiple, mask, x_dropped, scale, *factors
    )
    return out


def adapted_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Sequence[Factors],
    multiple: int = 1,
    mask: Tensor | None = None,
    x_dropped: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Compute ``adapted_linear`` of n layers that read one x, with one down-projection for all.

    Each layer has one ``Factors``, of any rank and output width; either every layer has a pool or
    none has. The backward sums the gradients with respect to x inside the products. Differentiable
    in x and in the factors. The other arguments are as for ``adapted_linear``.
    """
    tensors = (*weights, *biases, *(t for each in factors for t in each))
    outputs: tuple[Tensor, ...] = _AdaptedProjections.apply(
        x, len(weights), multiple, mask, x_dropped, scale, *tensors
    )
    return outputs


def adapted_group(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    A: Sequence[Tensor],
    A_pool: Tensor | None,
    B: Sequence[Tensor],
    B_pool: Tensor | None,
    d: Sequence[Tensor],
    multiple: int = 1,
) -> Tensor:
    """Compute ``adapted_linear`` of the L layers of one group, each on its own x.

    For layers whose inputs are all known: distillation, layerwise reconstruction, experts. The
    products of all layers are batched, so that layers with few tokens fill a device together. With
    few tokens the pool is read without copies (``ops.pool_in_packs``). The pool's gradients are
    summed over the layers.

    Args:
        x: (L, M, in).
        weights: one (out, in) for each layer, with any strides; get no gradients.
        bias: one (out,) for each layer, or None.
        A, B, d: one tensor for each layer, with shapes as in ``adapted_linear``.
        A_pool, B_pool: the group's pool, or None.
        multiple: see ``adapted_linear``.

    Returns:
        (L, M, out). Differentiable in x and in the factors.

    Raises:
        ValueError: x is not (L, M, in), or a list does not have one tensor for each layer.
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
                f"{name}: expected one tensor for each of x's {x.shape[0]} layers, got "
                f"{len(tensors)}."
            )
    stacked = None if bias is None else torch.stack(list(bias)).detach()
    layers = len(weights)
    y: Tensor = _AdaptedGroup.apply(
        x, stacked, A_pool, B_pool, multiple, layers, *weights, *A, *B, *d
    )
    return y


def dropout(x: Tensor, p: float) -> tuple[Tensor | None, Tensor | None, float]:
    """Draw dropout of x (..., in) for the linears: return ``(mask, x_dropped, 1 / (1 - p))``.

    x_dropped (M, in) is x with zeros, unscaled. The mask, uint8 (ceil(x.numel() / 8),), lets a
    backward compute x_dropped again. Both are None if p is 0. They come from torch's generator of
    x's device, so that ``manual_seed`` and checkpointing reproduce them. No call waits for the
    device. Raises ValueError or RuntimeError if p is not in [0, 1).
    """
    if p == 0:
        return None, None, 1.0
    words = ops.noise_words(x.device.type, x.numel())
    noise = torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, device=x.device)
    return *ops.dropout(noise, flatten_tokens(x.detach()), p), 1 / (1 - p)


def as_op_lists(factors: Sequence[Factors]) -> _FactorLists:
    """Return an operator's lists of A, A_pool, B, B_pool and d; a missing d becomes ones."""
    A, A_pool, B, B_pool, d = zip(*factors, strict=True)
    if any(v is None for v in d) and any(v is not None for v in d):
        d = tuple(each.A.new_ones(each.rank) if each.d is None else each.d for each in factors)
    return list(A), as_op_list(A_pool), list(B), as_op_list(B_pool), as_op_list(d)


def as_op_list(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Replace None for an operator: return [] if all are None, else empty tensors for None."""
    some = next((t for t in tensors if t is not None), None)
    return [] if some is None else [some.new_empty(0) if t is None else t for t in tensors]


def _needs(needs: Sequence[bool]) -> tuple[bool, bool]:
    """Return whether an A is trained, and whether a B or d is, for concatenated factors."""
    return any(needs[0::5]) or any(needs[1::5]), any(map(any, (needs[i::5] for i in (2, 3, 4))))


def _by_layer(tensors: Sequence[Any]) -> list[Factors]:
    return [Factors(*tensors[at : at + 5]) for at in range(0, len(tensors), 5)]


def _lists(tensors: Sequence[Tensor], layers: int) -> list[list[Tensor]]:
    """Split tensors that are ordered by kind into one list for each kind."""
    return [list(tensors[at : at + layers]) for at in range(0, len(tensors), layers)]


def _pack_group(
    x: Tensor,
    A: list[Tensor],
    A_pool: Tensor | None,
    B: list[Tensor],
    B_pool: Tensor | None,
    d: list[Tensor],
    multiple: int,
) -> tuple[tuple[Tensor, Tensor], _PoolPack]:
    """Pack every layer in x's dtype, and the pool into (Ap_pool, Bp_pool, d_pool) or three None."""
    if A_pool is None or B_pool is None or ops.pool_in_packs(x.shape[1], A_pool.shape[0]):
        return ops.pack_group(A, A_pool, B, B_pool, d, x.dtype, multiple), (None, None, None)
    own = A[0].shape[0]
    pack = ops.pack_group(A, None, B, None, [v[:own] for v in d], x.dtype, multiple)
    Ap_pool, Bp_pool = ops.pack(A_pool, None, B_pool, None, None, x.dtype, multiple)
    d_pool = torch.stack([v[own:] for v in d])
    if fill := Ap_pool.shape[0] - d_pool.shape[1]:
        d_pool = torch.constant_pad_nd(d_pool, (0, fill))
    return pack, (Ap_pool, Bp_pool, d_pool)
