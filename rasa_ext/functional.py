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


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, A_pool, B, B_pool, d, dtype, multiple):
        ctx.save_for_backward(B, B_pool, d)
        return ops.pack(A, A_pool, B, B_pool, d, dtype, multiple)

    @staticmethod
    @once_differentiable
    def backward(ctx, dAp, dBt):
        B, B_pool, d = ctx.saved_tensors
        return *_adapter_grads(dAp, dBt, B, B_pool, d), None, None


class _RasaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, A_pool, B, B_pool, d, multiple):
        Ap, Bt = ops.pack(A, A_pool, B, B_pool, d, x.dtype, multiple)
        flat = x.reshape(-1, x.shape[-1])
        y, U = ops.low_rank_linear(flat, weight, bias, Ap, Bt)
        ctx.save_for_backward(x, U, weight, A, A_pool, B, B_pool, d)
        ctx.multiple = multiple
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, U, weight, *adapter = ctx.saved_tensors
        need_x, _, _, *need = ctx.needs_input_grad
        dx, grads = _low_rank_backward(grad, x, U, weight, adapter, ctx.multiple, need_x, any(need))
        return dx, None, None, *grads, None


class _RasaAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, A, A_pool, B, B_pool, d, multiple):
        Ap, Bt = ops.pack(A, A_pool, B, B_pool, d, x.dtype, multiple)
        flat = x.reshape(-1, x.shape[-1])
        out, U = ops.low_rank_add(y.reshape(-1, y.shape[-1]), flat, Ap, Bt)
        ctx.save_for_backward(x, U, A, A_pool, B, B_pool, d)
        ctx.multiple = multiple
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, U, *adapter = ctx.saved_tensors
        need_y, need_x, *need = ctx.needs_input_grad
        dx, grads = _low_rank_backward(grad, x, U, None, adapter, ctx.multiple, need_x, any(need))
        return grad if need_y else None, dx, *grads, None


def _low_rank_backward(grad, x, U, weight, adapter, multiple, need_x, need_adapter):
    """dx in x's shape, and the gradients of A, A_pool, B, B_pool, d; None where not needed."""
    A, A_pool, B, B_pool, d = adapter
    Ap, Bt = ops.pack(A, A_pool, B, B_pool, d, x.dtype, multiple)
    dx, dAp, dBt = ops.low_rank_linear_backward(
        grad.reshape(-1, grad.shape[-1]),
        x.reshape(-1, x.shape[-1]),
        weight,
        U,
        Ap,
        Bt,
        need_x,
        need_adapter,
    )
    grads = _adapter_grads(dAp, dBt, B, B_pool, d) if need_adapter else (None,) * 5
    return dx.view(x.shape) if need_x else None, grads


def _adapter_grads(dAp, dBt, B, B_pool, d):
    dA, dA_pool, dB, dB_pool, dd = ops.pack_backward(dAp, dBt, B, B_pool, d)
    if B_pool is None:
        return dA, None, dB, None, dd
    return dA, dA_pool, dB, dB_pool, dd


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
