"""AdaptedExperts: frozen stacked experts with an adapter over each of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import bank_names, bank_weight
from rasa_ext.nn.adapted_linear import Adapter
from rasa_ext.nn.pack_cache import PackCache
from rasa_ext.nn.precision import restored
from rasa_ext.nn.routed import Routing, experts_linear, experts_low_rank, low_rank_rows
from rasa_ext.ops import Factors


class AdaptedExperts(nn.Module):
    """Frozen stacked experts with adapters: expert e computes with W[e] + dW[e].

    A weight's adapter has, for each expert, factors of its own, A (E, r-k, in), B (E, out, r-k) and
    d (E, R), and reads a pool: one for each expert, A_pool (E, P, in), or one for all, (P, in). The
    former is computed by expert as the private part is. The latter is computed densely, on the
    output's side once a token, after the sum over its experts, where no norm stands between.

    No tensor of the size of a whole stacked weight is made. As transformers' grouped products do,
    it computes in the weights' dtype, whatever autocast says.

    Who owns the adapters' tensors is a subclass's affair; it answers ``adapter(name)``.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.disabled = False
        # While merged: the matrices as they were, or less, by the weight's name and the expert.
        self.merged_base: dict[tuple[str, int], Any] | None = None
        self._caches = {name: PackCache() for name in bank_names(base_layer)}

    def adapter(self, name: str) -> Adapter | None:
        """Give the adapter of a stacked weight that a forward adds, or None."""
        raise NotImplementedError

    def adapters(self) -> Iterator[Adapter]:
        """Give every adapter of the experts, whether a forward adds it or not."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the adapters are folded into the base's weights at present."""
        return self.merged_base is not None

    def __getattr__(self, name: str) -> Any:
        """Look up on the base layer what model code asks its experts for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute (T, H) from hidden states (T, H) and a router's choices and weights (T, k)."""
        base: Any = self.base_layer
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                "call rasa_ext.unmerge(model) first."
            )
        if self.disabled or self.merged:
            found: Tensor = base(hidden_states, top_k_index, top_k_weights)
            return found
        up, down = bank_names(base)
        weight: Tensor = getattr(base, up)
        with torch.autocast(hidden_states.device.type, enabled=False):
            x, w = hidden_states.to(weight.dtype), top_k_weights.to(weight.dtype)
            routing = Routing.of(top_k_index, weight.shape[0])
            dropped = self._dropped(up, x)
            y = self._product(up, routing.to_pairs(x), dropped, routing, by_token=True)
            if (pool := self._pooled(up, dropped)) is not None:
                V, d, B_pool = pool
                y += (routing.to_pairs(V) * routing.of_experts(d)) @ B_pool.t()
            h: Tensor = base._apply_gate(y) if base.has_gate else base.act_fn(y)
            dropped = self._dropped(down, h)
            z = self._product(down, h, dropped, routing, by_token=False)
            pool = self._pooled(down, dropped)
            by_choice = w.reshape(-1, 1)
            by_pair = by_choice.index_select(0, routing.order)
            out = None
            if pool is not None:
                V, d, B_pool = pool
                used = V * routing.of_experts(d)
                if base.has_post_expert_norm:
                    z += used @ B_pool.t()
                else:
                    out = routing.to_tokens(used * by_pair) @ B_pool.t()
            if base.has_post_expert_norm:
                z = base.post_expert_norm(z)
            summed = routing.to_tokens(z * by_pair)
            return (summed if out is None else summed + out).to(hidden_states.dtype)

    def _dropped(self, name: str, x: Tensor) -> Tensor:
        """Give the input of an adapter, x itself unless it has dropout."""
        adapter = self.adapter(name)
        p = adapter.config.dropout if adapter is not None and self.training else 0.0
        return nn.functional.dropout(x, p) if p else x

    def _product(
        self, name: str, x: Tensor, dropped: Tensor, routing: Routing, *, by_token: bool
    ) -> Tensor:
        """Compute one weight's product by expert, with what its adapter adds by expert."""
        y = experts_linear(x, bank_weight(self.base_layer, name), routing)
        if self.base_layer.has_bias:
            y += getattr(self.base_layer, f"{name}_bias").index_select(0, routing.experts)
        adapter = self.adapter(name)
        if adapter is None:
            return y
        sources = adapter.sources()
        with_grad = torch.is_grad_enabled() and (
            dropped.requires_grad or any(source.requires_grad for source in sources)
        )
        if with_grad:
            self._caches[name].drop()
            own = _by_expert(adapter.factors())
            if own.rank:
                y += experts_low_rank(dropped, own, routing, by_token)
            return y
        Ap, Bp = self._packed(name, adapter, x.dtype, x.device)
        if Ap.shape[1]:
            rows = routing.to_pairs(dropped) if by_token else dropped
            y += ops.experts_linear(low_rank_rows(rows, Ap, routing), Bp, routing.offsets)
        return y

    def _pooled(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Give x A_pool^T, d (E, P) and B_pool (out, P) where all experts read one pool."""
        adapter = self.adapter(name)
        if adapter is None:
            return None
        A, A_pool, B, B_pool, d = adapter.factors()
        if A_pool is None or B_pool is None or A_pool.dim() == 3:
            return None
        V = x @ A_pool.to(x.dtype).t()
        if not A.numel():  # DistributedDataParallel waits for gradients of these as well
            V = V + A.sum() + B.sum()
        diagonal = A_pool.new_ones((A.shape[0], A_pool.shape[0])) if d is None else d
        return V, diagonal[:, -A_pool.shape[0] :].to(x.dtype), B_pool.to(x.dtype)

    def _packed(
        self, name: str, adapter: Adapter, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Give Ap and Bp without grad, from the cache while no source has changed."""

        def make() -> tuple[Tensor, Tensor]:
            multiple = ops.experts_rank_multiple(dtype)
            return ops.pack_experts(*_by_expert(adapter.factors()), dtype, multiple)

        if torch.compiler.is_compiling():
            return make()
        return self._caches[name].get(adapter.sources(), (dtype, device), make)

    def restore(self) -> None:
        """Give trainable parameters that were cast to a coarser dtype their config's again."""
        for adapter in self.adapters():
            if restored(adapter.sources(), adapter.config.adapter_dtype):
                self.drop_pack()

    def train(self, mode: bool = True) -> AdaptedExperts:
        """Switch the mode and forget the cached packs; for training, ``restore``."""
        if mode:
            self.restore()
        self.drop_pack()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module does, but round nothing on its way into trainable parameters."""
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def drop_pack(self) -> None:
        """Forget the cached packs."""
        for cache in self._caches.values():
            cache.drop()

    def _apply(self, *args: Any, **kwargs: Any) -> AdaptedExperts:
        """Forget the packs: moving and casting may replace memory behind a parameter's identity."""
        self.drop_pack()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # nn.Module's has no types
        return self


def _by_expert(factors: Factors) -> Factors:
    """Give the factors that are computed by expert: all, or without a pool that all share."""
    A, A_pool, B, B_pool, d = factors
    if A_pool is None or A_pool.dim() == 3:
        return Factors(A, A_pool, B, B_pool, d)
    return Factors(A, None, B, None, None if d is None else d[:, : A.shape[1]])
