"""The only autograd code: ``pack``, and the low-rank linear over a pack.

    pack(A, A_pool, B, B_pool, d)   -> Ap (R, in), Bt (out, R)
    rasa_linear(x, W, bias, ...)    -> x W^T + bias + (x Ap^T) Bt^T
    rasa_add(y, x, ...)             -> y + (x Ap^T) Bt^T

Saved for the backward are x, U = x Ap^T and the parameters themselves: the pack is made again
there, in weight space, so that no copy of the concatenated weights outlives a forward. All
gradients are first order; differentiating twice raises.

Everything that is RaSA's own is in ``pack``; the linear knows only Ap and Bt.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rasa_ext import ops

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
    def forward(ctx, x, weight, bias, A, A_pool, B, B_pool, d, multiple):
        Ap, Bt, rest = _packed(x, A, A_pool, B, B_pool, d, multiple)
        y, U = ops.low_rank_linear(rows(x), weight, bias, Ap, Bt, rest)
        ctx.save_for_backward(x, U, weight, A, A_pool, B, B_pool, d)
        ctx.multiple = multiple
        return shaped_like(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, U, weight, *adapter = ctx.saved_tensors
        need_x, _, _, *need, _ = ctx.needs_input_grad
        dx, grads = _low_rank_backward(grad, x, U, weight, adapter, ctx.multiple, need_x, any(need))
        return dx, None, None, *grads, None


class _RasaAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, A, A_pool, B, B_pool, d, multiple):
        Ap, Bt, rest = _packed(x, A, A_pool, B, B_pool, d, multiple)
        out, U = ops.low_rank_add(rows(y), rows(x), Ap, Bt, rest)
        ctx.save_for_backward(x, U, A, A_pool, B, B_pool, d)
        ctx.multiple = multiple
        return shaped_like(out, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, U, *adapter = ctx.saved_tensors
        need_y, need_x, *need, _ = ctx.needs_input_grad
        dx, grads = _low_rank_backward(grad, x, U, None, adapter, ctx.multiple, need_x, any(need))
        return grad if need_y else None, dx, *grads, None


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


def _low_rank_backward(grad, x, U, weight, adapter, multiple, need_x, need_adapter):
    """dx in x's shape, and the gradients of A, A_pool, B, B_pool, d; None where not needed."""
    A, A_pool, B, B_pool, d = adapter
    Ap, Bt, rest = _packed(x, A, A_pool, B, B_pool, d, multiple)
    dx, dAp, dBt, dd_rest = ops.low_rank_linear_backward(
        rows(grad), rows(x), weight, U, Ap, Bt, rest, need_x, need_adapter
    )
    dx = dx.view(x.shape) if need_x else None
    if not need_adapter:
        return dx, (None,) * 5
    in_pack = d if rest is None else None
    dA, dA_pool, dB, dB_pool, dd = ops.pack_backward(dAp, dBt, B, B_pool, in_pack)
    if rest is not None:
        dd = dd_rest[: d.shape[0]].to(d.dtype)
    if A_pool is None:
        dA_pool = dB_pool = None
    return dx, (dA, dA_pool, dB, dB_pool, dd)


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
) -> Tensor:
    """``x W^T + bias + x dW^T`` with dW = [B | B_pool] diag(d) [A ; A_pool].

    x is (..., in), weight (out, in) with any strides and without a gradient of its own, bias
    (out,); the three share one dtype, in which the adapter is computed. Shapes of the adapter: see
    ``pack``. Differentiable in x and in the adapter.
    """
    return _RasaLinear.apply(x, weight, bias, A, A_pool, B, B_pool, d, multiple)


def rasa_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor,
    multiple: int = 1,
) -> Tensor:
    """``y + x dW^T``: the adapter over the output (..., out) of a base that is not a plain GEMM.

    x is (..., in) in y's dtype. Differentiable in y, x and the adapter; y is left as it was.
    """
    return _RasaAdd.apply(y, x, A, A_pool, B, B_pool, d, multiple)
