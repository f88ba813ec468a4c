"""Adapted experts under PEFT: parameters under adapter names, the maths of ``AdaptedExperts``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import bank_shape, bank_weight, is_transposed
from rasa_ext.nn.adapted_experts import AdaptedExperts
from rasa_ext.nn.adapter import Adapter
from rasa_ext.ops import Factors
from rasa_ext.patching.parts import CHUNK_BYTES
from rasa_ext.patching.subtraction import Rest, rest
from rasa_ext.peft.named import NamedAdapters
from rasa_ext.peft.summed import summed


class RasaPeftBank(NamedAdapters):
    """The named adapters of one stacked weight (E, out, in): what PEFT switches, merges and saves.

    It stands in its ``RasaPeftExperts`` under the weight's own name. The weight stays the base's.
    """

    experts: RasaPeftExperts

    def __init__(self, experts: RasaPeftExperts, name: str) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # known, but not as a submodule
        self.name = name
        # While merged: for each chunk of experts the weights as they were, or what subtracting
        # would not give back of them.
        self.merged_base: list[Tensor | Rest] | None = None
        self._begin()
        self.train(experts.training)

    def get_base_layer(self) -> nn.Module:
        """Give the experts without adapters."""
        base: nn.Module = self.experts.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        """The stacked weight, as it lies."""
        weight: Tensor = getattr(self.get_base_layer(), self.name)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def forget(self) -> None:
        """Forget the experts' cached packs."""
        self.experts.drop_pack()

    def adapter(self) -> Adapter | None:
        """Give the adapter that a forward adds, the sum of all active ones, or None."""
        names = self.live()
        return summed([self.named(name) for name in names]) if names else None

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute an adapter's dW of every expert, in the stacked weight's orientation.

        It is float32, or float64 over a float64 base, and of the size of the whole weight.
        """
        base: Any = self.get_base_layer()
        delta = self.weight.new_empty(bank_shape(base, self.name), dtype=self._wide)
        for experts in self._chunks():
            delta[experts] = self._delta([adapter], experts)
        return delta.transpose(1, 2) if is_transposed(base) else delta

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError where the sum with these adapters, or the active ones, is not finite."""
        names = self.active_adapters if adapter_names is None else adapter_names
        every = self._with_merged(names)
        for index, experts in enumerate(self._chunks() if every else ()):
            before = self._unmerged(index, experts)
            merged = (before.to(self._wide) + self._delta(every, experts)).to(before.dtype)
            if not torch.isfinite(merged).all():
                raise ValueError(
                    f"safe_merge: expected finite merged weights, but with {', '.join(names)} some "
                    f"are not finite in {before.dtype}; nothing was merged."
                )

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_base: bool = True,
    ) -> None:
        """Fold adapters into the weight, and keep what ``unmerge`` needs: a copy, or less.

        Every expert's W + dW is one sum, rounded once. A chunk of experts is taken at a time.
        Raises as ``check_merge`` does, with ``safe_merge``.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.configs]
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        every = self._with_merged(names)
        if self.merged_base is not None:
            self.unmerge()
        kept: list[Tensor | Rest] = []
        weight = self._stacked()
        try:
            for experts in self._chunks():
                before, delta = weight[experts], self._delta(every, experts)
                merged = (before.to(delta.dtype) + delta).to(before.dtype)
                if keep_base:
                    kept.append(rest(before, merged, delta) if self.subtracts else before.clone())
                before.copy_(merged)
        except BaseException:  # out of memory, or an interrupt: all experts or none
            self._put_back(kept, every)
            raise
        self.merged_base, self.merged_adapters = (kept if keep_base else None), every

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the weight back the exact values that it had before the first ``merge``.

        Raises RuntimeError where unmerging subtracts, and an adapter has changed since.
        """
        if self.merged_base is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if any(isinstance(each, Rest) for each in self.merged_base):
            for index, experts in enumerate(self._chunks()):  # all that can raise, before a write
                self._unmerged(index, experts)
        self._put_back(self.merged_base, self.merged_adapters)
        self.merged_base, self.merged_adapters = None, []

    def _put_back(self, kept: list[Tensor | Rest], merged: list[str]) -> None:
        """Undo the merge of the first chunks, those of which something is kept."""
        for experts, each in zip(self._chunks(), kept, strict=False):
            chunk = self._stacked()[experts]
            if isinstance(each, Rest):
                each = each.original(chunk, self._delta(merged, experts))
            chunk.copy_(each)

    def _unmerged(self, index: int, experts: slice) -> Tensor:
        """Give a chunk of the weight as it was before the first merge."""
        chunk = self._stacked()[experts]
        if self.merged_base is None:
            return chunk
        kept = self.merged_base[index]
        if isinstance(kept, Rest):
            return kept.original(chunk, self._delta(self.merged_adapters, experts))
        return kept

    def _stacked(self) -> Tensor:
        """View the weight as (E, out, in)."""
        return bank_weight(self.get_base_layer(), self.name).detach()

    @property
    def _wide(self) -> torch.dtype:
        """The dtype in which weights are summed."""
        return ops.accumulation_dtype(self.weight.dtype)

    def _chunks(self) -> Iterator[slice]:
        """Cut the experts into runs of at most CHUNK_BYTES of dW."""
        count, out_features, in_features = bank_shape(self.get_base_layer(), self.name)
        step = max(1, CHUNK_BYTES // (out_features * in_features * self._wide.itemsize))
        return (slice(begin, begin + step) for begin in range(0, count, step))

    def _delta(self, names: list[str], experts: slice) -> Tensor:
        """Compute the dW (n, out, in) of some experts, the sum of one adapter or more."""
        first, *others = (self.named(name).factors() for name in names)
        delta = expert_deltas(first, experts, self._wide)
        for factors in others:
            delta += expert_deltas(factors, experts, self._wide)
        return delta


class RasaPeftExperts(AdaptedExperts):
    """Frozen stacked experts, with any number of named adapters over each of their weights.

    The adapters are children under the weights' own names, and PEFT's layers, which this is not:
    it computes with those of them that are active.
    """

    def banks(self) -> dict[str, RasaPeftBank]:
        """Give what owns the adapters, by the name of the weight."""
        children = self._modules.items()
        return {name: each for name, each in children if isinstance(each, RasaPeftBank)}

    def add_bank(self, name: str) -> None:
        """Let a weight have adapters, if it cannot yet."""
        if name not in self._modules:
            # add_module refuses a name that the base answers for.
            self._modules[name] = RasaPeftBank(self, name)

    def adapter(self, name: str) -> Adapter | None:
        """Give the adapter of a stacked weight that a forward adds, or None."""
        bank = self._modules.get(name)
        return bank.adapter() if isinstance(bank, RasaPeftBank) else None

    def adapters(self) -> Iterator[Adapter]:
        """Give every adapter of the experts, active or not."""
        for bank in self.banks().values():
            for name in bank.configs:
                yield bank.named(name)

    @property
    def merged(self) -> bool:
        """Whether adapters are folded into the weights, and none is added beside them."""
        banks = self.banks().values()
        return any(bank.merged for bank in banks) and not any(bank.live() for bank in banks)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Compute (T, H): the base and every active adapter."""
        live = False
        for bank in self.banks().values():
            if bank.disable_adapters and bank.merged:
                bank.unmerge()
            live = live or bool(bank.live())
        if live:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        return self.base_forward(hidden_states, top_k_index, top_k_weights)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give PEFT the base, with adapters in it if asked, which keeps no copy of it."""
        for bank in self.banks().values() if merge else ():
            bank.merge(safe_merge, adapter_names, keep_base=False)
        base: nn.Module = self.base_layer
        return base


def expert_deltas(factors: Factors, experts: slice, dtype: torch.dtype) -> Tensor:
    """Compute the dW (n, out, in) of some experts, as one product over all ranks.

    Args:
        factors: A (E, r-k, in), B (E, out, r-k), d (E, R), and a pool (P, in) and (out, P) of all,
            or (E, P, in) and (E, out, P) of each expert.
        experts: n of the E.
        dtype: that of the product.
    """
    # Cast first, so that d times B is not rounded to the adapter's dtype.
    some = factors.with_pool_of_each().map(lambda factor: factor[experts].to(dtype))
    return ops.delta_group(*ops.pack_experts(*some, dtype))
