"""Methods whose layers give k of their r ranks to a pool that all layers of a group read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rasa_ext.methods.base import (
    MOST_RANKS,
    AdapterConfig,
    Counts,
    Place,
    Rate,
    checked_alpha,
    checked_integer,
    checked_rank,
    fresh_A,
    fresh_B,
)
from rasa_ext.methods.patterns import check_pattern, matches_end
from rasa_ext.ops import Factors

Kept = tuple[tuple[str, tuple[int, int, int]], ...] | Mapping[str, Sequence[int]]
"""What ``prune`` left, by layer: private ranks, ranks of the pool, and ranks that the pool has.
Pairs, once a config has checked it."""

Pattern = Counts
"""A rank for each of some patterns of layers' names."""


class PooledConfig(AdapterConfig):
    """The part that RaSA and SoRA share: tensors, their shapes, and which ranks are left.

    A layer owns A (r-k, in), B (out, r-k) and d, its group A_pool (L*k, in) and B_pool (out, L*k).
    Of stacked experts A, B and d have the experts as their first dimension, and with
    ``experts="slot"`` the pool as well.
    After ``rasa_ext.training.prune`` a layer owns what is left of them, and ``slots``, the ranks
    that it reads from what is left of the pool.
    """

    rank: int
    k: int | None
    alpha: float
    rank_pattern: Pattern
    kept: Kept

    def _check_ranks(self) -> None:
        """Check the fields above and bring them into their canonical form."""
        rank = checked_rank(self.rank)
        k = usual_k(rank) if self.k is None else checked_integer("k", self.k)
        if not 0 <= k <= rank:
            raise ValueError(f"k: expected 0 <= k <= rank (rank is {rank}), got {k}.")
        pattern = _checked_pattern(self.rank_pattern, k)
        for name, counts in dict(self.kept).items():
            if not isinstance(counts, Sequence) or len(counts) != 3:
                raise ValueError(f"kept: expected three counts for {name!r}, got {counts}.")
        kept = tuple((name, tuple(counts)) for name, counts in dict(self.kept).items())
        self._set(rank=rank, k=k, alpha=checked_alpha(self.alpha), rank_pattern=pattern, kept=kept)

    def kept_at(self, name: str) -> tuple[int, int, int] | None:
        """Give what pruning left of a layer, or None where it was not pruned."""
        return _kept(cast(Any, self.kept)).get(name)

    def own(self, place: Place) -> dict[str, Tensor]:
        """Make A (r-k, in), B (out, r-k) and d (r-k+L*k,), all trained."""
        (own, pooled), dtype = self.ranks_at(place), self.adapter_dtype
        stack = (place.experts,) if place.experts else ()
        d = torch.empty((*stack, own + pooled), dtype=dtype, device=place.device)
        if not d.is_meta:  # where shapes are asked for, whatever a file says of them
            d.copy_(self.diagonal(own, pooled))
        tensors: dict[str, Tensor] = {
            "A": fresh_A(own, place, dtype, stack),
            "B": fresh_B(own, place, dtype, stack),
            "d": nn.Parameter(d),
        }
        if self.kept_at(place.name):
            tensors["slots"] = torch.arange(pooled, device=place.device)
        return tensors

    def pool(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Make A (L*k, in) and B (out, L*k); nothing where k = 0."""
        first, dtype = places[0], self.adapter_dtype
        kept = self.kept_at(first.name)
        size = self.ranks(self._sharers(first))[1] if kept is None else kept[2]
        if not size:
            return {}
        each = self.grouping_of_experts == "slot" and first.experts
        stack = (first.experts,) if each else ()
        return {"A": fresh_A(size, first, dtype, stack), "B": fresh_B(size, first, dtype, stack)}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], place: Any) -> Factors:
        """Give A, B, d and the pool as they stand; of a pruned pool the ranks that are left."""
        slots = own.get("slots")
        if slots is None or not pool:
            return super().factors(own, pool, place)
        rows = (pool["A"], pool["B"].transpose(-1, -2))
        A_pool, B_pool = (each.index_select(-2, slots) for each in rows)
        return Factors(own["A"], A_pool, own["B"], B_pool.transpose(-1, -2), own["d"])

    def ranks(self, num_layers: int) -> tuple[int, int]:
        """Count a layer's private and pooled ranks in a group of L layers: r-k and L*k."""
        k = usual_k(self.rank) if self.k is None else self.k
        return self.rank - k, num_layers * k

    def ranks_at(self, place: Place) -> tuple[int, int]:
        """Count the same at one place, which ``rank_pattern`` or pruning may have changed."""
        if (kept := self.kept_at(place.name)) is not None:
            return kept[0], kept[1]
        own, pooled = self.ranks(self._sharers(place))
        for pattern, rank in cast("tuple[tuple[str, int], ...]", self.rank_pattern):
            if matches_end(pattern, place.name):
                return own + rank - self.rank, pooled
        return own, pooled

    def check_layers(self, names: Collection[str]) -> None:
        """Raise ValueError where a pattern of ``rank_pattern`` is that of no adapted layer."""
        for pattern in dict(self.rank_pattern):
            if not any(matches_end(pattern, name) for name in names):
                raise ValueError(
                    "rank_pattern: expected patterns that the ends of adapted layers' names match, "
                    f"but {pattern!r} matches none of {len(names)}, such as {next(iter(names))!r}."
                )

    def _sharers(self, place: Place) -> int:
        """Count what gives ranks to the pool that a place reads: L, or the experts of one layer."""
        each = self.grouping_of_experts == "layer" and place.experts
        return place.experts if each else place.num_layers

    def diagonal(self, own: int, pooled: int) -> Tensor:
        """Make the d of a layer that begins: (own + pooled,) float32, private entries first."""
        raise NotImplementedError

    def learning_rates(self, place: Place) -> dict[str, Rate]:
        """Let gates follow a rate of their own, without decay."""
        entries = self.gate_entries(*self.ranks_at(place))
        return {"d": Rate(weight_decay=0.0, gate=True)} if entries.stop > entries.start else {}

    def gate_entries(self, own: int, pooled: int) -> slice:
        """Tell which entries of d are gates: what ``ProximalGates`` drives to zero."""
        raise NotImplementedError

    def gate_scale(self, num_layers: int) -> float:
        """Give what an entry of d is divided by to be a gate."""
        raise NotImplementedError


def usual_k(rank: int) -> int:
    """Give the paper's choice of k for a rank, which None stands for."""
    return max(rank // 8, 1)


@functools.lru_cache(maxsize=8)
def _kept(pairs: tuple[tuple[str, tuple[int, int, int]], ...]) -> dict[str, tuple[int, int, int]]:
    return dict(pairs)


def _checked_pattern(value: Any, k: int) -> tuple[tuple[str, int], ...]:
    """Return ``rank_pattern`` as pairs; raise, naming it, where it is none or cannot be."""
    if not isinstance(value, Mapping | tuple):
        raise TypeError(
            "rank_pattern: expected a mapping of patterns of layers' names to ranks, got "
            f"{type(value).__name__}."
        )
    for pattern, rank in dict(value).items():
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"rank_pattern: expected patterns as strings, got {pattern!r}.")
        check_pattern("rank_pattern", pattern)
        if not max(k, 1) <= checked_integer("rank_pattern", rank) <= MOST_RANKS:
            raise ValueError(
                f"rank_pattern: expected ranks of at least {max(k, 1)} (k is {k}) and at most "
                f"{MOST_RANKS}, got {rank} for {pattern!r}."
            )
    return tuple(dict(value).items())
