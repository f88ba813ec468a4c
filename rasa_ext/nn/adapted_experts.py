"""AdaptedExperts: frozen stacked experts with an adapter over each stacked weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.experts import (
    activated,
    expert_weight,
    expert_weight_names,
    has_bias,
    has_post_expert_norm,
)
from rasa_ext.base_layers.layouts import quantized_stack
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.routed import Routing, experts_linear, experts_low_rank, quantized_experts_linear
from rasa_ext.ops import Factors


class AdaptedExperts(AdaptedModule):
    """Frozen stacked experts with adapters: expert e computes with W[e] + dW[e].

    A weight's adapter has private factors for each expert, A (E, r-k, in), B (E, out, r-k) and
    d (E, R), and a pool: one for each expert, A_pool (E, P, in), or one for all, (P, in). A pool
    for each expert is computed by expert, like the private factors. A shared pool is computed
    densely. The product with B_pool runs once for each token, after the sum over the token's
    experts, unless a norm comes first.

    No tensor as large as a stacked weight is made. Products run in the weights' dtype and ignore
    autocast, as transformers' grouped products do.

    A subclass owns the adapters' tensors and implements ``live(name)``.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if hasattr(base_layer, "_hf_hook") and any(p.is_meta for p in base_layer.parameters()):
            raise ValueError(
                "experts: expected expert weights on a device, but accelerate has offloaded them; "
                "keep them on a device, or pass experts=None."
            )
        self.base_layer = base_layer
        self.disabled = False
        # While merged: what restores each matrix, by the weight's name and the expert.
        self.merged_base: dict[tuple[str, int], Any] | None = None

    def live_adapters(self, name: str) -> list[Adapter]:
        """Return the adapters that a forward adds to a stacked weight."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the adapters are currently merged into the base's weights."""
        return self.merged_base is not None

    def __getattr__(self, name: str) -> Any:
        """Fall back to attributes of the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute (T, H) by the base while merged or disabled, else by ``adapted_forward``."""
        if self.merged:
            self.check_not_trained()
        run: Any = self.base_layer if self.disabled or self.merged else self.adapted_forward
        y: Tensor = run(*args, **kwargs)
        return y

    def adapted_forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Compute (T, H) from hidden states (T, H) and a router's choices and weights (T, k).

        Without choices and weights, as in Llama 4, the rows are sorted by expert, equally many for
        each, and already weighted by the router.
        """
        base: Any = self.base_layer
        up, down = expert_weight_names(base)
        if top_k_index is None or top_k_weights is None:
            every = torch.arange(getattr(base, up).shape[0], device=hidden_states.device)
            top_k_index = every.repeat_interleave(len(hidden_states) // len(every))[:, None]
            top_k_weights = hidden_states.new_ones(()).expand(len(hidden_states), 1)
        quantized = quantized_stack(base, up) is not None
        dtype = hidden_states.dtype if quantized else getattr(base, up).dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            routing = Routing.of(top_k_index, getattr(base, up).shape[0])
            shares = top_k_weights.reshape(-1, 1).index_select(0, routing.order)
            y, pools = self._product(up, hidden_states.to(dtype), routing, by_token=True)
            for pool in pools:
                y.addmm_(routing.scaled(pool.V, pool.d, by_token=True), pool.B.t())
            z, pools = self._product(down, activated(base, y), routing, by_token=False)
            used = [(routing.scaled(pool.V, pool.d, by_token=False), pool.B) for pool in pools]
            early = has_post_expert_norm(base)
            if early:
                for rows, B in used:
                    z.addmm_(rows, B.t())
                z = base.post_expert_norm(z)
            out = routing.to_tokens(z * shares)
            # Once for each token, after the sum over experts, unless a norm comes first.
            for rows, B in () if early else used:
                out = out + routing.to_tokens(rows * shares).to(dtype) @ B.t()
            return out.to(hidden_states.dtype)

    def _product(
        self, name: str, x: Tensor, routing: Routing, *, by_token: bool
    ) -> tuple[Tensor, list[_Pooled]]:
        """Compute one weight's product by expert, including the adapters' parts by expert.

        The second result has the adapters' dense parts.
        """
        rows = routing.to_pairs(x) if by_token else x
        if (stack := quantized_stack(self.base_layer, name)) is not None:
            y = quantized_experts_linear(rows, stack, routing)
        else:
            y = experts_linear(rows, expert_weight(self.base_layer, name), routing)
        if has_bias(self.base_layer):
            y += getattr(self.base_layer, f"{name}_bias").index_select(0, routing.experts)
        pools = []
        for adapter in self.live_adapters(name):
            p = adapter.config.dropout if self.training else 0.0
            dropped = nn.functional.dropout(x, p) if p else x
            pack = adapter.pack(x.dtype)
            if pack.Ap.shape[1]:
                if p or torch.is_grad_enabled():  # a backward saves x by token
                    y += experts_low_rank(dropped, pack, routing, by_token)
                else:
                    y += experts_low_rank(rows, pack, routing, by_token=False)
            pools += _pooled(adapter.factors(), dropped)
        return y, pools


class BareExperts(AdaptedExperts):
    """Experts without an adapter, computed as adapted ones are: for packed weights."""

    def live_adapters(self, name: str) -> list[Adapter]:
        """Return no adapter."""
        return []


class _Pooled(NamedTuple):
    """The part of a shared pool: it adds (V[s] * d[e]) B^T to each pair s of expert e."""

    V: Tensor
    """x A_pool^T, one row for each row of x."""
    d: Tensor
    """(E, P)"""
    B: Tensor
    """(out, P)"""


def _pooled(factors: Factors, x: Tensor) -> list[_Pooled]:
    """Compute the dense part of an adapter on x, if experts share a pool."""
    A, A_pool, _, B_pool, d = factors
    if A_pool is None or B_pool is None or A_pool.dim() == 3:
        return []
    ranks = A_pool.shape[0]
    d = A_pool.new_ones((A.shape[0], ranks)) if d is None else d[:, -ranks:]
    return [_Pooled(x @ A_pool.to(x.dtype).t(), d, B_pool.to(x.dtype))]
