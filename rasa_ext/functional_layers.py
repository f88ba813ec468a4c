"""Autograd of low-rank linears of many layers on given activations: ``functional.rasa_layers``.

Saved for the backward is what one layer saves: x, U (and V = x A_pool^T), and the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rasa_ext import ops


class _RasaLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, A_pool, B_pool, multiple, layers, *tensors):
        weights, A, B, d = _lists(tensors, layers)
        pack, pool = _packed_layers(x, A, A_pool, B, B_pool, d, multiple)
        y, U, V = ops.linear_layers(x, weights, bias, *pack, *pool)
        ctx.save_for_backward(x, U, V, A_pool, B_pool, *tensors)
        ctx.multiple, ctx.layers = multiple, layers
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, U, V, A_pool, B_pool, *tensors = ctx.saved_tensors
        weights, A, B, d = _lists(tensors, ctx.layers)
        need_x, _, *need = ctx.needs_input_grad
        pack, pool = _packed_layers(x, A, A_pool, B, B_pool, d, ctx.multiple)
        dx, dAp, dBt, dAp_pool, dBt_pool, dd_pool = ops.linear_layers_backward(
            grad, x, weights, U, V, *pack, *pool, need_x, any(need)
        )
        if not need_x:
            dx = None
        frozen = (None,) * ctx.layers
        if not any(need):
            return dx, None, None, None, None, None, *frozen * 4
        dA_pool = dB_pool = None
        if pool[0] is None:
            dA, dA_pool, dB, dB_pool, dd = ops.pack_layers_backward(dAp, dBt, B, B_pool, d)
        else:
            d_own = [v[: b.shape[1]] for v, b in zip(d, B, strict=True)]
            dA, _, dB, _, dd = ops.pack_layers_backward(dAp, dBt, B, None, d_own)
            pooled = B_pool.shape[1]
            dA_pool, _, dB_pool, _, _ = ops.pack_backward(dAp_pool, dBt_pool, B_pool, None, None)
            dd = torch.cat((dd, dd_pool[:, :pooled].to(dd.dtype)), 1)
        if A_pool is None:
            dA_pool = dB_pool = None
        return dx, None, dA_pool, dB_pool, None, None, *frozen, *dA, *dB, *dd


def _lists(tensors, layers):
    """Tensors one kind after the other, as a list of each kind."""
    return [list(tensors[at : at + layers]) for at in range(0, len(tensors), layers)]


def _packed_layers(x, A, A_pool, B, B_pool, d, multiple):
    """Ap, Bt of every layer in x's dtype, and (Ap_pool, Bt_pool, d_pool) or three None."""
    if A_pool is None or ops.pool_in_packs(x.shape[1], A_pool.shape[0]):
        return ops.pack_layers(A, A_pool, B, B_pool, d, x.dtype, multiple), (None,) * 3
    own = A[0].shape[0]
    pack = ops.pack_layers(A, None, B, None, [v[:own] for v in d], x.dtype, multiple)
    Ap_pool, Bt_pool = ops.pack(A_pool, None, B_pool, None, None, x.dtype, multiple)
    d_pool = torch.stack([v[own:] for v in d])
    if fill := Ap_pool.shape[0] - d_pool.shape[1]:
        d_pool = torch.constant_pad_nd(d_pool, (0, fill))
    return pack, (Ap_pool, Bt_pool, d_pool)


def rasa_layers(
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
    """``rasa_linear`` of the L layers of one group, each on its own x: (L, M, in) to (L, M, out).

    For layers whose inputs are given at once: distillation, layerwise reconstruction, experts. The
    products of all layers are batches, so that layers with few tokens fill a device together; with
    few tokens the pool is read as it is and not repeated (``ops.pool_in_packs``).

    Every list has one tensor a layer: weights (out, in), with any strides, and bias (out,), both in
    x's dtype and without gradients of their own; A, B and d as in ``functional.pack``.
    Differentiable in x and in the adapters; the pool's gradients are summed over the layers.

    Raises:
        ValueError: x is not (L, M, in) with one tensor a layer in each list.
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
    return _RasaLayers.apply(x, stacked, A_pool, B_pool, multiple, layers, *weights, *A, *B, *d)
