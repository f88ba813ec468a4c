"""What is written as a LoRA: one adapter of a model, whatever put it into the model.

``rasa_ext.export_lora`` and ``rasa_ext.peft.export_lora`` each describe their model so.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn

from rasa_ext.methods.base import AdapterConfig
from rasa_ext.ops import Factors
from rasa_ext.patching.tokens import TokenRows

WEIGHT = "weight"


class Adapted(NamedTuple):
    """An adapted linear layer, or stacked experts of which one or both weights are adapted."""

    base: Any
    factors: dict[str, Factors]
    """By the name of the weight; `WEIGHT` in a linear layer."""


@dataclasses.dataclass(frozen=True)
class Export:
    """One adapter of a model, under the names that the layers have in the plain model."""

    root: nn.Module
    """The model in which the names lead to modules."""
    config: AdapterConfig
    linears: dict[str, Adapted]
    experts: dict[str, Adapted]
    saved: dict[str, Tensor]
    """Modules that were trained in full, and trained rows, by the names of their tensors."""
    modules_to_save: tuple[str, ...]
    tokens: tuple[TokenRows, ...]
    """The tables of which rows were trained."""
    task_type: str | None
    fast_path: bool
    """Whether torch's fast path would pass the adapted layers by, had it not been turned off."""

    def effective_rank(self) -> int:
        """Give the largest rank of the change of a weight."""
        layers = (*self.linears.values(), *self.experts.values())
        return max(each.rank for layer in layers for each in layer.factors.values())

    def tied_to_embedding(self) -> str | None:
        """Name an adapted layer whose weight is an embedding's, if there is one."""
        tables = {id(m.weight) for m in self.root.modules() if isinstance(m, nn.Embedding)}
        tied = (name for name, each in self.linears.items() if id(each.base.weight) in tables)
        return next(tied, None)
