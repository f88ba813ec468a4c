"""RaSA with gates: the entries of d on pooled ranks, which training may close."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig
from rasa_ext.methods import (
    Factors,
    Place,
    Rate,
    checked_number,
    document_fields,
    option,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

Kept = tuple[tuple[str, tuple[int, int, int]], ...] | Mapping[str, Sequence[int]]
"""The ranks of pruned layers, by name: private ranks, pooled ranks that the layer reads, and ranks
of the pool. Pairs, once a config has checked it."""


@dataclasses.dataclass(frozen=True)
class GatedRasaConfig(RasaConfig):
    """The config of a RaSA whose pooled ranks have gates: those entries of d, in no paper.

    ``rasa_research.training.ProximalGates`` drives them to zero, as SoRA's (arXiv 2311.11696), and
    ``prune`` takes closed ones out. A pruned layer has ``slots``, the ranks that it reads from what
    is left of the pool. Experts that are adapted as well have no gates.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Example:
        >>> from rasa_research.methods import GatedRasaConfig
        >>> model = rasa_ext.patch_model(model, config=GatedRasaConfig(rank=8, k=1))
        >>> from rasa_research.training import ProximalGates
        >>> gates = ProximalGates(model, threshold=1e-3)
    """

    method: ClassVar[str] = "gated-rasa"
    title: ClassVar[str] = "RaSA with gates"
    paper: ClassVar[str] = "2503.12576"

    k: int | None = option(
        None,
        "How many of the r ranks every layer gives to its group's shared pool, as in RaSA; None is "
        "max(rank // 8, 1).",
    )
    gate_threshold: float | None = option(
        None,
        "By how much each gate moves towards zero in a step of `rasa-ext finetune`, which needs "
        "it, such as 1e-3. A loop of yours gives it to ProximalGates.",
    )
    prune: bool = option(False, "Whether `rasa-ext finetune` takes closed gates out at the end.")
    gate_rate: float = option(
        1.0,
        "The learning rate of d, which has the gates, over that of all else, where "
        "rasa_ext.training.parameter_groups makes the optimizer's groups.",
    )
    kept: Kept = option(
        (),
        "The ranks of pruned layers: private, pooled, and of the pool. prune sets it, and "
        "load_official_experts where it makes one adapter of an expert's gate and up.",
        counts=3,
    )

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        super().__post_init__()
        threshold = self.gate_threshold
        if threshold is not None:
            if not 0 <= checked_number("gate_threshold", threshold) < math.inf:
                raise ValueError(f"gate_threshold: expected a number >= 0, got {threshold}.")
            if self.experts:
                raise ValueError(
                    f"gate_threshold: expected None beside experts={self.experts!r}, whose pools "
                    f"cannot be pruned, got {threshold}."
                )
        if not 0 < checked_number("gate_rate", self.gate_rate) < math.inf:
            raise ValueError(f"gate_rate: expected a number above 0, got {self.gate_rate}.")
        for name, counts in dict(self.kept).items():
            if not isinstance(counts, Sequence) or len(counts) != 3:
                raise ValueError(f"kept: expected three counts for {name!r}, got {counts}.")
        self._set(kept=tuple((name, tuple(counts)) for name, counts in dict(self.kept).items()))

    def kept_at(self, name: str) -> tuple[int, int, int] | None:
        """Give a pruned layer's ranks (private, pooled, of the pool), or None for another."""
        return _by_name(self.kept).get(name)

    def own(self, place: Place) -> dict[str, Tensor]:
        """Make A (r-k, in), B (out, r-k) and d, all trained, and slots where ranks were pruned."""
        tensors = super().own(place)
        if kept := self.kept_at(place.name):
            tensors["slots"] = torch.arange(kept[1], device=place.device)
        return tensors

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], place: Any) -> Factors:
        """Give A, B, d and the ranks of the pool that the layer reads."""
        slots = own.get("slots")
        if slots is None or not pool:
            return super().factors(own, pool, place)
        rows = (pool["A"], pool["B"].transpose(-1, -2))
        A_pool, B_pool = (each.index_select(-2, slots) for each in rows)
        return Factors(own["A"], A_pool, own["B"], B_pool.transpose(-1, -2), own["d"])

    def ranks_at(self, place: Place) -> tuple[int, int]:
        """Count a layer's private and pooled ranks, which pruning may have lowered."""
        kept = self.kept_at(place.name)
        return super().ranks_at(place) if kept is None else kept[:2]

    def pool_size(self, place: Place) -> int:
        """Count the ranks of the pool at a place, which pruning may have lowered."""
        kept = self.kept_at(place.name)
        return super().pool_size(place) if kept is None else kept[2]

    def learning_rates(self, place: Place) -> dict[str, Rate]:
        """Let gates follow a rate of their own, without decay."""
        entries = self.gate_entries(*self.ranks_at(place))
        gates = entries.stop > entries.start
        return {"d": Rate(lr=self.gate_rate, weight_decay=0.0)} if gates else {}

    def callbacks(self, model: nn.Module) -> Sequence[TrainerCallback]:
        """Give what moves the gates after each step, and prunes at the end if asked."""
        from rasa_research.training import ProximalGates

        if self.gate_threshold is None:
            raise ValueError(
                f"gate_threshold: expected a number with the method {self.method!r}, whose gates "
                "nothing closes without, got none; 1e-3 is a start."
            )
        return [ProximalGates(model, self.gate_threshold).callback(prune=self.prune)]

    def gate_entries(self, own: int, pooled: int) -> slice:
        """Tell which entries of d are gates: those of pooled ranks."""
        return slice(own, own + pooled)

    def gate_scale(self, num_layers: int) -> float:
        """Give what gates are divided by: the value that they begin with, so that it is one."""
        return self.alpha / 2 / max(self.ranks(num_layers)[1], 1)


@functools.lru_cache(maxsize=8)
def _by_name(
    pairs: tuple[tuple[str, tuple[int, int, int]], ...],
) -> dict[str, tuple[int, int, int]]:
    return dict(pairs)


document_fields(GatedRasaConfig)
