"""Differentiable products by expert, and the sorting of a router's choices.

    Routing.to_pairs(x)               one row for each (token, expert) pair, sorted by expert
    Routing.to_tokens(z)              the sum over the experts of each token
    Routing.scaled(V, d)              V[s] d[e]: each expert's diagonal, on rows shared by all
    experts_linear(x, W, routing)     x[s] W[e]^T
    experts_low_rank(x, pack, ...)    (x[s] Ap[e]^T) Bp[e]

For an adapter's backward, x is saved by token, not by pair, with U = x Ap^T. W + dW is never
formed, and every sum has a fixed order, also on a GPU. All gradients are first order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_ext import ops
from rasa_ext.base_layers.layouts import QuantizedStack, multiply, multiply_back
from rasa_ext.nn.adapter import Packed
from rasa_ext.nn.function import Function, first_order


class Routing(NamedTuple):
    """A router's choices: S = T * k pairs of a token and an expert, sorted by expert."""

    experts: Tensor
    """(S,) the expert of each pair."""
    tokens: Tensor
    """(S,) the token of each pair."""
    order: Tensor
    """(S,) the index of each pair among the T * k choices, token by token."""
    place: Tensor
    """(S,) the pair of each choice: the inverse of ``order``."""
    offsets: Tensor
    """(E,) int32, the index at which each expert's pairs end."""
    choices: int
    """k, the number of experts for each token."""

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> Routing:
        """Sort a router's choices (T, k) by expert."""
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
        offsets = torch.searchsorted(ids, every, right=True, out_int32=True)
        choices = top_k_index.shape[-1]
        tokens = torch.div(order, choices, rounding_mode="floor")
        return cls(ids, tokens, order, place, offsets, choices)

    def to_pairs(self, x: Tensor) -> Tensor:
        """Return x (T, n) with one row for each pair, (S, n); differentiable."""
        return _Moved.apply(x, self, True)

    def to_tokens(self, z: Tensor) -> Tensor:
        """Sum z (S, n) over the pairs of each token, (T, n); differentiable."""
        return _Moved.apply(z, self, False)

    def scaled(self, V: Tensor, d: Tensor, by_token: bool) -> Tensor:
        """Scale each pair's row of V by the expert's row of d (E, n).

        V is (T, n) if ``by_token``, else (S, n). Returns (S, n) in V's dtype; differentiable.
        """
        return _Scaled.apply(V, d, self, by_token)


def _pairs(x: Tensor, routing: Routing) -> Tensor:
    return x.index_select(0, routing.tokens)


def _summed(z: Tensor, routing: Routing) -> Tensor:
    if routing.choices == 1:
        return z.index_select(0, routing.place)
    by_token = z.index_select(0, routing.place).view(-1, routing.choices, z.shape[1])
    return by_token.sum(1)


class _Moved(Function):
    """Compute ``_pairs`` or ``_summed``; each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing, to_pairs: bool) -> Tensor:
        ctx.routing, ctx.back = routing, _summed if to_pairs else _pairs
        return _pairs(x, routing) if to_pairs else _summed(x, routing)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad, ctx.routing), None, None


class _Scaled(Function):
    @staticmethod
    def forward(ctx: Any, V: Tensor, d: Tensor, routing: Routing, by_token: bool) -> Tensor:
        ctx.routing, ctx.by_token = routing, by_token
        ctx.save_for_backward(V, d)
        rows = _pairs(V, routing) if by_token else V
        return rows * d.to(V.dtype).index_select(0, routing.experts)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        V, d = ctx.saved_tensors
        routing: Routing = ctx.routing
        dV = grad * d.to(V.dtype).index_select(0, routing.experts)
        # A sum over all of an expert's tokens: half precision would lose small terms.
        dots = grad.to(ops.accumulation_dtype(grad.dtype))
        dots = dots * (_pairs(V, routing) if ctx.by_token else V)
        bounds = torch.cat((routing.offsets.new_zeros(1), routing.offsets))
        dd = torch.segment_reduce(dots, "sum", offsets=bounds, axis=0, initial=0, unsafe=True)
        return _summed(dV, routing) if ctx.by_token else dV, dd.to(d.dtype), None, None


class _PackedLinear(Function):
    """``_Linear`` over a packed stacked weight, which the backward unpacks again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: QuantizedStack, offsets: Tensor) -> Tensor:
        ctx.stack, ctx.offsets = stack, offsets
        return _by_expert(x, stack, offsets, multiply)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _by_expert(grad, ctx.stack, ctx.offsets, multiply_back), None, None


def _by_expert(x: Tensor, stack: QuantizedStack, offsets: Tensor, product: Any) -> Tensor:
    """Run a product of each expert's rows with the expert's packed weight."""
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    rows = zip(stack.parts(), x.split(sizes), strict=True)
    return torch.cat([product(stack.layout, part, chunk) for part, chunk in rows])


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)
        return ops.experts_linear(x, weight.transpose(1, 2), offsets)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        dx = ops.experts_linear(grad, weight, offsets) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else ops.experts_outer(grad, x, offsets), None


class _LowRank(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing: Routing,
        by_token: bool,
        Ap: Tensor,
        Bp: Tensor,
        Ap_port: Tensor | None,
        Bp_port: Tensor | None,
    ) -> Tensor:
        ctx.routing, ctx.by_token = routing, by_token
        rows = _pairs(x, routing) if by_token else x
        U = ops.experts_linear(rows, Ap.transpose(1, 2), routing.offsets)
        need_A, need_B = ctx.needs_input_grad[5:]
        ctx.save_for_backward(x if need_A else None, U if need_B else None, Ap, Bp)
        return ops.experts_linear(U, Bp, routing.offsets)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, U, Ap, Bp = ctx.saved_tensors
        routing, grad, dx, dAp, dBp = ctx.routing, grad.contiguous(), None, None, None
        if U is not None:
            dBp = ops.experts_outer(U, grad, routing.offsets)
        if x is not None or ctx.needs_input_grad[0]:
            H = ops.experts_linear(grad, Bp.transpose(1, 2), routing.offsets)
            if x is not None:
                rows = _pairs(x, routing) if ctx.by_token else x
                dAp = ops.experts_outer(H, rows, routing.offsets)
            if ctx.needs_input_grad[0]:
                dx = ops.experts_linear(H, Ap, routing.offsets)
                dx = _summed(dx, routing) if ctx.by_token else dx
        return dx, None, None, None, None, dAp, dBp


def experts_linear(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """Compute x[s] weight[e]^T for the pairs s of every expert e; differentiable.

    Args:
        x: (S, in), sorted by expert.
        weight: (E, out, in), in x's dtype.
        routing: the router's choices.

    Returns:
        (S, out). For a frozen weight, only the weight is saved for the backward.

    Example:
        >>> from rasa_ext.nn.routed import Routing, experts_linear
        >>> routing = Routing.of(torch.tensor([[0, 2], [2, 1]]), experts=3)
        >>> x, weight = torch.randn(2, 4), torch.randn(3, 5, 4)
        >>> y = experts_linear(routing.to_pairs(x), weight, routing)
        >>> torch.allclose(routing.to_tokens(y)[0], (weight[0] + weight[2]) @ x[0], atol=1e-5)
        True
    """
    return _Linear.apply(x, weight, routing.offsets)


def quantized_experts_linear(x: Tensor, stack: QuantizedStack, routing: Routing) -> Tensor:
    """Compute ``experts_linear`` of a packed stacked weight, by tiles of rows."""
    return _PackedLinear.apply(x, stack, routing.offsets)


def experts_low_rank(x: Tensor, pack: Packed, routing: Routing, by_token: bool) -> Tensor:
    """Compute (x[s] Ap[e]^T) Bp[e] for the pairs s of every expert e; differentiable.

    Args:
        x: (T, in) with ``by_token``, else (S, in), sorted by expert.
        pack: Ap (E, Rp, in) and Bp (E, Rp, out) in x's dtype; gradients go to the ports.
        routing: the router's choices.
        by_token: whether x has one row for each token.

    Returns:
        (S, out).
    """
    return _LowRank.apply(x, routing, by_token, *pack)
