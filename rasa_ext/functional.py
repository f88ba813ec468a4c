"""The only autograd code: ``pack``, and the low-rank linear over a pack.

    pack(A, A_pool, B, B_pool, d)   -> Ap (R, in), Bt (out, R)
    rasa_linear(x, W, bias, ...)    -> x W^T + bias + (x Ap^T) Bt^T
    rasa_add(y, x, ...)             -> y + (x Ap^T) Bt^T
    rasa_siblings(x, Ws, ...)       -> rasa_linear of every layer that reads the same x
    rasa_layers(x, W, bias, ...)    -> rasa_linear of L layers on L given inputs

Saved for the backward are x, U = x Ap^T and the parameters themselves: the pack is made again
there, in weight space, so that no copy of the concatenated weights outlives a forward. Dropout adds
its mask, a bit for each element of x. All gradients are first order; differentiating twice raises.

Everything that is RaSA's own is in ``pack``; the linear knows only Ap and Bt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rasa_ext import ops
from rasa_ext.functional_layers import rasa_layers as rasa_layers

_unsafe_view = torch.ops.aten._unsafe_view.default


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, A_pool, B, B_pool, d, dtype, multiple):
        ctx.save_for_backward(B, B_pool, d)
        return ops.pack(A, A_pool, B, B_pool, d, dtype, multiple)

    @staticmethod
    @once_differentiable
    def backward(ctx, dAp, dBt):
        B, B_pool, d = ctx.saved_tensors
        dA, dA_pool, dB, dB_pool, dd = ops.pack_backward(dAp, dBt, B, B_pool, d)
        if B_pool is None:
            dA_pool = dB_pool = None
        return dA, dA_pool, dB, dB_pool, dd, None, None


class _RasaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, A_pool, B, B_pool, d, multiple, mask, scale):
        Ap, Bt, rest = _packed(x, A, A_pool, B, B_pool, d, multiple)
        y, U = ops.low_rank_linear(rows(x), weight, bias, Ap, Bt, rest, mask, scale)
        ctx.save_for_backward(x, U, mask, weight, A, A_pool, B, B_pool, d)
        ctx.multiple, ctx.scale = multiple, scale
        return shaped_like(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_x, _, _, *need, _, _, _ = ctx.needs_input_grad
        dx, grads = _low_rank_backward(ctx, grad, need_x, any(need))
        return dx, None, None, *grads, None, None, None


class _RasaAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, A, A_pool, B, B_pool, d, multiple, mask, scale):
        Ap, Bt, rest = _packed(x, A, A_pool, B, B_pool, d, multiple)
        out, U = ops.low_rank_add(rows(y), rows(x), Ap, Bt, rest, mask, scale)
        ctx.save_for_backward(x, U, mask, None, A, A_pool, B, B_pool, d)
        ctx.multiple, ctx.scale = multiple, scale
        return shaped_like(out, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_y, need_x, *need, _, _, _ = ctx.needs_input_grad
        dx, grads = _low_rank_backward(ctx, grad, need_x, any(need))
        return grad if need_y else None, dx, *grads, None, None, None


class _RasaSiblings(torch.autograd.Function):
    """``tensors`` are n weights, n biases, and n of each of A, A_pool, B, B_pool and d."""

    @staticmethod
    def forward(ctx, x, multiple, *tensors):
        n = len(tensors) // 7
        weights, biases, adapters = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        Ap, Bt, d = _packed_siblings(x, adapters, n, multiple)
        y, U = ops.siblings_linear(rows(x), weights, given(biases), Ap, Bt, d)
        ctx.save_for_backward(x, U, *weights, *adapters)
        ctx.multiple = multiple
        return tuple(shaped_like(t, x) for t in y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, U, *tensors = ctx.saved_tensors
        n = len(grads)
        weights, adapters = tensors[:n], tensors[n:]
        need_x, _, *need = ctx.needs_input_grad
        Ap, Bt, d = _packed_siblings(x, adapters, n, ctx.multiple)
        grads = [rows(grad) for grad in grads]
        dx, dAp, dBt, dd = ops.siblings_linear_backward(
            grads, rows(x), weights, U, Ap, Bt, d, need_x, any(need)
        )
        dx = dx.view(x.shape) if need_x else None
        if not any(need):
            return dx, *(None,) * (1 + 7 * n)
        own = []
        for i, (low, up) in enumerate(zip(_rows_of(dAp, Bt), dBt, strict=True)):
            in_linear = None if d is None else dd[sum(t.shape[1] for t in Bt[:i]) :]
            own.append(_adapter_grads(low, up, adapters[i::n], in_linear))
        by_name = (grad for kind in zip(*own, strict=True) for grad in kind)
        return dx, None, *(None,) * (2 * n), *by_name


def _rows_of(dAp: Tensor, Bt: list[Tensor]) -> tuple[Tensor, ...]:
    """Each sibling's rows of dAp (Rp, in)."""
    return dAp.split([up.shape[1] for up in Bt])


def _packed_siblings(x, adapters, n, multiple):
    """Ap of all, Bt of each in x's dtype, and the padded diagonals where they are not in them."""
    A, A_pool, B, B_pool, d = (adapters[i * n : (i + 1) * n] for i in range(5))
    A_pool, B_pool = given(A_pool), given(B_pool)
    if ops.diagonal_in_pack(x.device.type):
        return *ops.pack_siblings(A, A_pool, B, B_pool, d, x.dtype, multiple), None
    Ap, Bt = ops.pack_siblings(A, A_pool, B, B_pool, [], x.dtype, multiple)
    fills = [up.shape[1] - own.shape[0] for up, own in zip(Bt, d, strict=True)]
    if any(fills):
        d = [torch.constant_pad_nd(own, (0, fill)) for own, fill in zip(d, fills, strict=True)]
    return Ap, Bt, torch.cat(d)


def given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """For an operator's list: nothing where nobody has one, else one without elements for None."""
    some = next((t for t in tensors if t is not None), None)
    return [] if some is None else [some.new_empty(0) if t is None else t for t in tensors]


def rows(x: Tensor) -> Tensor:
    """x (..., n) as (M, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def shaped_like(y: Tensor, x: Tensor) -> Tensor:
    """y (M, n), which the caller gives up, as (..., n) with x's leading dimensions.

    Not a view to autograd: what a Function returns as one could not be modified in place.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _packed(x, A, A_pool, B, B_pool, d, multiple):
    """Ap, Bt in x's dtype, and the diagonal (Rp,) where it is not in them."""
    if ops.diagonal_in_pack(x.device.type):
        return *ops.pack(A, A_pool, B, B_pool, d, x.dtype, multiple), None
    Ap, Bt = ops.pack(A, A_pool, B, B_pool, None, x.dtype, multiple)
    if fill := Ap.shape[0] - d.shape[0]:
        d = torch.constant_pad_nd(d, (0, fill))
    return Ap, Bt, d


def _low_rank_backward(ctx, grad, need_x, need_adapter):
    """dx in x's shape, and the gradients of A, A_pool, B, B_pool, d; None where not needed."""
    x, U, mask, weight, *adapter = ctx.saved_tensors
    Ap, Bt, rest = _packed(x, *adapter, ctx.multiple)
    need = need_x, need_adapter
    dx, dAp, dBt, dd_rest = ops.low_rank_linear_backward(
        rows(grad), rows(x), weight, U, Ap, Bt, rest, *need, mask, ctx.scale
    )
    dx = dx.view(x.shape) if need_x else None
    if not need_adapter:
        return dx, (None,) * 5
    return dx, _adapter_grads(dAp, dBt, adapter, None if rest is None else dd_rest)


def _adapter_grads(dAp, dBt, adapter, dd_linear):
    """Gradients of A, A_pool, B, B_pool, d; ``dd_linear`` begins with d's if the linear had d."""
    _, A_pool, B, B_pool, d = adapter
    in_pack = d if dd_linear is None else None
    dA, dA_pool, dB, dB_pool, dd = ops.pack_backward(dAp, dBt, B, B_pool, in_pack)
    if dd_linear is not None:
        dd = dd_linear[: d.shape[0]].to(d.dtype)
    if A_pool is None:
        dA_pool = dB_pool = None
    return dA, dA_pool, dB, dB_pool, dd


def dropout(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    """What dropout leaves of x (any shape): a mask of bits for the linears below, and 1 / (1 - p).

    The mask, uint8 (ceil(x.numel() / 8),) or None where p is 0, is drawn from torch's generator of
    x's device, so that ``manual_seed`` and checkpointing, which restores its state, reproduce it.
    Nothing waits for the device. p is in [0, 1); ValueError or RuntimeError where it is not.
    """
    if p == 0:
        return None, 1.0
    words = ops.noise_words(x.device.type, x.numel())
    noise = torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, device=x.device)
    return ops.dropout_mask(noise, x.detach(), p), 1 / (1 - p)


def pack(
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor,
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ap = [A ; A_pool] (Rp, in) and Bt = [B | B_pool] diag(d) (out, Rp) in ``dtype``.

    Shapes: A (r-k, in), A_pool (L*k, in) or None, B (out, r-k), B_pool (out, L*k) or None,
    d (R,) with R = r-k+L*k; Rp is R rounded up to ``multiple`` with zeros. Differentiable.

    The linears below may leave d out of their packs and apply it to U: ``ops.diagonal_in_pack``.
    """
    return _Pack.apply(A, A_pool, B, B_pool, d, dtype, multiple)


def rasa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor,
    multiple: int = 1,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``x W^T + bias + x dW^T`` with dW = [B | B_pool] diag(d) [A ; A_pool].

    x is (..., in), weight (out, in) with any strides and without a gradient of its own, bias
    (out,); the three share one dtype, in which the adapter is computed. Shapes of the adapter: see
    ``pack``. Differentiable in x and in the adapter. With ``mask`` and ``scale`` from ``dropout``
    the x beside dW is what that left.
    """
    return _RasaLinear.apply(x, weight, bias, A, A_pool, B, B_pool, d, multiple, mask, scale)


def rasa_siblings(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    adapters: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]],
    multiple: int = 1,
) -> tuple[Tensor, ...]:
    """``rasa_linear`` of n layers that read the same x, with one down-projection for all.

    One ``(A, A_pool, B, B_pool, d)`` a layer, of any ranks and output widths; either every layer
    has a pool or none has. In the backward the layers' gradients with respect to x add up inside
    the products. Differentiable in x and in the adapters.
    """
    return _RasaSiblings.apply(
        x, multiple, *weights, *biases, *(t for kind in zip(*adapters, strict=True) for t in kind)
    )


def rasa_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor,
    multiple: int = 1,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``y + x dW^T``: the adapter over the output (..., out) of a base that is not a plain GEMM.

    x is (..., in) in y's dtype. Differentiable in y, x and the adapter; y is left as it was.
    ``mask`` and ``scale`` as for ``rasa_linear``.
    """
    return _RasaAdd.apply(y, x, A, A_pool, B, B_pool, d, multiple, mask, scale)
