"""AdaptedExperts: frozen stacked experts with an adapter over each stacked weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import (
    activated,
    expert_weight,
    expert_weight_names,
    has_bias,
    has_post_expert_norm,
)
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.pack_cache import PackCache
from rasa_ext.nn.precision import HALVES, is_sharing
from rasa_ext.nn.routed import Routing, experts_linear, experts_low_rank
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

    A subclass owns the adapters' tensors and implements ``adapter(name)``.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if hasattr(base_layer, "_hf_hook") and any(p.is_meta for p in base_layer.parameters()):
            raise ValueError(
                "experts: expected expert weights on a device, but accelerate has offloaded "
                "them, for the experts' own forward alone; keep them on one, or pass experts=None."
            )
        self.base_layer = base_layer
        self.disabled = False
        # While merged: what restores each matrix, by the weight's name and the expert.
        self.merged_base: dict[tuple[str, int], Any] | None = None
        self._caches = {name: PackCache() for name in expert_weight_names(base_layer)}

    def adapter(self, name: str) -> Adapter | None:
        """Return the adapter that a forward adds to a stacked weight, or None."""
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

    def forward(
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
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                "call rasa_ext.unmerge(model) first."
            )
        if self.disabled or self.merged:
            return self.base_forward(hidden_states, top_k_index, top_k_weights)
        up, down = expert_weight_names(base)
        if top_k_index is None or top_k_weights is None:
            every = torch.arange(getattr(base, up).shape[0], device=hidden_states.device)
            top_k_index = every.repeat_interleave(len(hidden_states) // len(every))[:, None]
            top_k_weights = hidden_states.new_ones(()).expand(len(hidden_states), 1)
        dtype = getattr(base, up).dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            routing = Routing.of(top_k_index, getattr(base, up).shape[0])
            shares = top_k_weights.reshape(-1, 1).index_select(0, routing.order)
            y, pool = self._product(up, hidden_states.to(dtype), routing, by_token=True)
            if pool is not None:
                y.addmm_(routing.scaled(pool.V, pool.d, by_token=True), pool.B.t())
            z, pool = self._product(down, activated(base, y), routing, by_token=False)
            # Once for each token, after the sum over experts, unless a norm comes first.
            used = None if pool is None else routing.scaled(pool.V, pool.d, by_token=False)
            if has_post_expert_norm(base):
                if pool is not None and used is not None:
                    z.addmm_(used, pool.B.t())
                z = base.post_expert_norm(z)
            out = routing.to_tokens(z * shares)
            if pool is not None and used is not None and not has_post_expert_norm(base):
                out = out + routing.to_tokens(used * shares).to(dtype) @ pool.B.t()
            return out.to(hidden_states.dtype)

    def base_forward(self, hidden_states: Tensor, *choices: Tensor | None) -> Tensor:
        """Run the experts without adapters."""
        found: Tensor = self.base_layer(hidden_states, *(c for c in choices if c is not None))
        return found

    def _product(
        self, name: str, x: Tensor, routing: Routing, *, by_token: bool
    ) -> tuple[Tensor, _Pooled | None]:
        """Compute one weight's product by expert, including the adapter's part by expert.

        The second result is the adapter's dense part, or None.
        """
        rows = routing.to_pairs(x) if by_token else x
        y = experts_linear(rows, expert_weight(self.base_layer, name), routing)
        if has_bias(self.base_layer):
            y += getattr(self.base_layer, f"{name}_bias").index_select(0, routing.experts)
        adapter = self.adapter(name)
        if adapter is None:
            return y, None
        if self.training and (p := adapter.config.dropout):
            x = nn.functional.dropout(x, p)
            rows = routing.to_pairs(x) if by_token else x
        sources, factors = adapter.sources(), adapter.factors()
        with_grad = torch.is_grad_enabled() and (
            x.requires_grad or any(source.requires_grad for source in sources)
        )
        if with_grad:
            self._caches[name].drop()
            if sources[0].dtype in HALVES and not (torch.compiler.is_compiling() or is_sharing()):
                self.restore()
                factors = adapter.factors()
            own = _by_expert(factors)
            if own.rank:
                y += experts_low_rank(x, own, routing, by_token)
        else:
            Ap, Bp = self._packed(name, adapter, x.dtype, x.device)
            if Ap.shape[1]:
                U = ops.experts_linear(rows, Ap.transpose(1, 2), routing.offsets)
                y += ops.experts_linear(U, Bp, routing.offsets)
        return y, _pooled(factors, x)

    def _packed(
        self, name: str, adapter: Adapter, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return Ap and Bp without grad, from the cache if no source has changed."""

        def make() -> tuple[Tensor, Tensor]:
            multiple = ops.experts_rank_multiple(dtype)
            return ops.pack_experts(*_by_expert(adapter.factors()), dtype, multiple)

        if torch.compiler.is_compiling():
            return make()
        return self._caches[name].get(adapter.sources(), (dtype, device), make)

    def drop_pack(self) -> None:
        """Drop the cached packs."""
        for cache in self._caches.values():
            cache.drop()


class _Pooled(NamedTuple):
    """The part of a shared pool: it adds (V[s] * d[e]) B^T to each pair s of expert e."""

    V: Tensor
    """x A_pool^T, one row for each row of x."""
    d: Tensor
    """(E, P)"""
    B: Tensor
    """(out, P)"""


def _pooled(factors: Factors, x: Tensor) -> _Pooled | None:
    """Compute the dense part of an adapter on x, or None if experts share no pool."""
    A, A_pool, B, B_pool, d = factors
    if A_pool is None or B_pool is None or A_pool.dim() == 3:
        return None
    ranks = A_pool.shape[0]
    d = A_pool.new_ones((A.shape[0], ranks)) if d is None else d[:, -ranks:]
    if not A.numel():  # DistributedDataParallel waits for gradients of A and B too
        d = d + A.sum() + B.sum()
    return _Pooled(x @ A_pool.to(x.dtype).t(), d, B_pool.to(x.dtype))


def _by_expert(factors: Factors) -> Factors:
    """Return the factors that are computed by expert: all but a shared pool."""
    A, A_pool, B, B_pool, d = factors
    if A_pool is None or A_pool.dim() == 3:
        return Factors(A, A_pool, B, B_pool, d)
    return Factors(A, None, B, None, None if d is None else d[:, : A.shape[1]])
