"""RaSA: layers share a pool of ranks, k from each, and each layer has a diagonal over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from rasa_ext.methods.base import (
    MOST_RANKS,
    AdapterConfig,
    Counts,
    checked_choice,
    checked_integer,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)
from rasa_ext.methods.patterns import check_pattern, matches_end
from rasa_ext.nn.adapter import LayerSpec

GROUPINGS = ("slot", "layer", "shared")
"""Which experts share a pool."""
STARTS = ("lora", "paper")


class _Filled:
    """A number that a config filled in, and fills in anew after ``dataclasses.replace``."""


class _FilledScale(_Filled, float):
    pass


class _FilledCount(_Filled, int):
    pass


@dataclasses.dataclass(frozen=True)
class RasaConfig(AdapterConfig):
    """The config of one RaSA adapter (arXiv 2503.12576, section 3).

    A layer with a weight (out, in) owns A (r-k, in), B (out, r-k) and d (r-k+L*k,). A group of L
    layers owns A_pool (L*k, in) and B_pool (out, L*k): dW = [B | B_pool] diag(d) [A ; A_pool]. For
    stacked experts, A, B and d have the experts as the first dimension; with ``experts="slot"`` the
    pool has it too. The config is frozen, and each field's ``metadata["help"]`` has the text below.

    Raises:
        TypeError, ValueError: the message names the field, what was expected and what was given.

    Example:
        >>> config = rasa_ext.RasaConfig(rank=16, k=None, alpha=32.0)
        >>> config.k  # max(rank // 8, 1), the paper's choice
        2
        >>> model = rasa_ext.patch_model(model, config=config)
    """

    method: ClassVar[str] = "rasa"
    title: ClassVar[str] = "RaSA"
    paper: ClassVar[str] = "2503.12576"
    absent: ClassVar[Mapping[str, str]] = {"start": "paper"}  # the official code's files

    rank: int = option(8, "LoRA rank r per layer. Trainable parameters grow with it as in LoRA.")
    k: int | None = option(
        1,
        "Number of the r ranks that every layer gives to the group's shared pool, 0 <= k <= rank. "
        "0 means plain LoRA, None means max(rank // 8, 1). The effective rank is r - k + L*k for L "
        "layers.",
    )
    alpha: float | None = option(
        None,
        "LoRA's scale times the rank. It sets where the diagonal starts, which is then trained. "
        "None is the rank, a scale of 1, or 8, the official code's default, with start='paper'.",
    )
    start: str = option(
        "lora",
        "Where the diagonal starts. 'lora': at LoRA's scale alpha/r for private ranks and for the "
        "k that the layer gave to the pool, and at alpha/r/L for those that other layers gave, so "
        "that training begins like LoRA's. 'paper': at alpha/2/(r-k) for private ranks and "
        "alpha/2/(L*k) for pooled ranks.",
    )
    rank_pattern: Counts = option(
        (),
        "Other ranks r for some layers: a mapping from patterns to ranks. A pattern is a regular "
        "expression that must match a layer's whole name, or the part after one of its dots. k is "
        "the same for all layers, so only the number of private ranks differs.",
        counts=1,
    )
    experts: str | None = option(
        None,
        "Also adapts the stacked (3-D) expert weights of mixtures of experts, and sets which "
        "experts share a pool: with 'shared' all experts of all layers, with 'slot' the experts "
        "with one index in all layers, with 'layer' all experts of one layer. 'shared' with "
        "k = rank makes a pool-only adapter. None does not adapt these weights.",
    )

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        checked_choice("start", self.start, STARTS)
        filled = [n for n in ("alpha", "k") if isinstance(getattr(self, n), _Filled | None)]
        if "alpha" in filled:
            self._set(alpha=8 if self.start == "paper" else self.rank)
        super().__post_init__()
        k = max(self.rank // 8, 1) if "k" in filled else checked_integer("k", self.k)
        if not 0 <= k <= self.rank:
            raise ValueError(f"k: expected 0 <= k <= rank (rank is {self.rank}), got {k}.")
        self._set(k=_FilledCount(k) if "k" in filled else k)
        if "alpha" in filled:
            self._set(alpha=_FilledScale(cast(float, self.alpha)))
        for pattern, rank in dict(self.rank_pattern).items():
            if not isinstance(pattern, str) or not pattern:
                raise TypeError(f"rank_pattern: expected patterns as strings, got {pattern!r}.")
            check_pattern("rank_pattern", pattern)
            if not max(k, 1) <= rank <= MOST_RANKS:
                raise ValueError(
                    f"rank_pattern: expected ranks of at least {max(k, 1)} (k is {k}) and at most "
                    f"{MOST_RANKS}, got {rank} for {pattern!r}."
                )
        checked_choice("experts", self.experts, (None, *GROUPINGS))

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r-k, in), B (out, r-k) and d (r-k+L*k,), all trained."""
        (own, pooled), dtype = self.ranks_at(spec), self.adapter_dtype
        stack = (spec.experts,) if spec.experts else ()
        d = torch.empty((*stack, own + pooled), dtype=dtype, device=spec.device)
        if not d.is_meta:  # meta: only the shapes matter
            d.copy_(self.diagonal(spec))
        A, B = fresh_A(own, spec, dtype, stack), fresh_B(own, spec, dtype, stack)
        return {"A": A, "B": B, "d": nn.Parameter(d)}

    def group_tensors(self, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
        """Make A (L*k, in) and B (out, L*k); nothing if k = 0."""
        first, dtype = specs[0], self.adapter_dtype
        size = self.pool_size(first)
        if not size:
            return {}
        by_expert = self.grouping_of_experts == "slot" and first.experts
        stack = (first.experts,) if by_expert else ()
        return {"A": fresh_A(size, first, dtype, stack), "B": fresh_B(size, first, dtype, stack)}

    def ranks(self, num_layers: int) -> tuple[int, int]:
        """Return a layer's private and pooled ranks in a group of L layers: r-k and L*k."""
        k = cast(int, self.k)
        return self.rank - k, num_layers * k

    def ranks_at(self, spec: LayerSpec) -> tuple[int, int]:
        """Return one layer's private and pooled ranks, with ``rank_pattern`` applied."""
        own, pooled = self.ranks(1)[0], self.pool_size(spec)
        for pattern, rank in cast("tuple[tuple[str, int], ...]", self.rank_pattern):
            if matches_end(pattern, spec.name):
                return own + rank - self.rank, pooled
        return own, pooled

    def pool_size(self, spec: LayerSpec) -> int:
        """Return the ranks of a layer's pool: k for each layer, or expert, that shares the pool."""
        return self.ranks(spec.experts if self._by_expert(spec) else spec.num_layers)[1]

    def _by_expert(self, spec: LayerSpec) -> bool:
        """Return whether experts of one layer, and not layers, give ranks to the pool."""
        return self.grouping_of_experts == "layer" and bool(spec.experts)

    def check_layers(self, names: Collection[str]) -> None:
        """Raise ValueError if a pattern of ``rank_pattern`` matches no adapted layer."""
        for pattern in dict(self.rank_pattern):
            if not any(matches_end(pattern, name) for name in names):
                raise ValueError(
                    "rank_pattern: expected patterns that the ends of adapted layers' names match, "
                    f"but {pattern!r} matches none of {len(names)}, such as {next(iter(names))!r}."
                )

    def diagonal(self, spec: LayerSpec) -> Tensor:
        """Return a layer's initial d, float32, private entries first; see ``start``.

        (own + pooled,), or (experts, own + pooled) if the experts of a layer share a pool.
        """
        (own, pooled), alpha, k = self.ranks_at(spec), cast(float, self.alpha), cast(int, self.k)
        if self.start == "paper":
            share = alpha / 2 if pooled else alpha
            entries = ((own, share / max(own, 1)), (pooled, share / max(pooled, 1)))
            return torch.cat([torch.full((count,), value) for count, value in entries])
        scale = alpha / max(own + k, 1)
        givers = range(spec.experts) if self._by_expert(spec) else (spec.index,)
        d = torch.full((len(givers), own + pooled), scale)
        d[:, own:] *= k / max(pooled, 1)  # 1 / L: all others together begin as large as one
        for row, giver in zip(d, givers, strict=True):
            row[own + giver * k : own + giver * k + k] = scale
        return d if self._by_expert(spec) else d[0]


document_fields(RasaConfig)
