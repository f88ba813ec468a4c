"""One adapter of a model, described for export as a LoRA.

``rasa_ext.export_lora`` and ``rasa_ext.peft.export_lora`` each describe their model this way.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn

from rasa_ext.base_layers.linear import stored_weight
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.ops import Factors
from rasa_ext.patching.tokens import TokenRows

WEIGHT = "weight"


class Adapted(NamedTuple):
    """An adapted linear layer, or stacked experts with one or both weights adapted."""

    base: Any
    factors: dict[str, Factors]
    """Factors by the name of the weight; `WEIGHT` in a linear layer."""


@dataclasses.dataclass(frozen=True)
class Export:
    """One adapter of a model, by the names of layers in the plain model."""

    root: nn.Module
    """The model in which the names are looked up."""
    config: AdapterConfig
    linears: dict[str, Adapted]
    experts: dict[str, Adapted]
    saved: dict[str, Tensor]
    """Modules trained in full, and trained rows, by tensor name."""
    modules_to_save: tuple[str, ...]
    tokens: tuple[TokenRows, ...]
    """The tables with trained rows."""
    task_type: str | None
    fast_path: bool
    """Whether torch's fast path would bypass the adapted layers, had it not been disabled."""

    def effective_rank(self) -> int:
        """Return the largest rank of a weight's change."""
        layers = (*self.linears.values(), *self.experts.values())
        return max(factors.rank for layer in layers for factors in layer.factors.values())

    def tied_to_embedding(self) -> str | None:
        """Return an adapted layer that shares the weight of an embedding, or None."""
        tables = {id(m.weight) for m in self.root.modules() if isinstance(m, nn.Embedding)}
        weights = {name: id(stored_weight(linear.base)) for name, linear in self.linears.items()}
        return next((name for name, weight in weights.items() if weight in tables), None)
