"""LoRA, for comparisons in one implementation: one A and B for each layer, at a fixed scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rasa_ext.methods.base import (
    AdapterConfig,
    checked_choice,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)
from rasa_ext.nn.adapter import LayerSpec
from rasa_ext.ops import Factors


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """The config of LoRA (arXiv 2106.09685): dW = s B A with s = alpha / r.

    ``RasaConfig(k=0)`` differs: it trains a diagonal instead of s.

    Raises:
        TypeError, ValueError: the message names the field, what was expected and what was given.

    Example:
        >>> from rasa_ext.methods import LoraConfig
        >>> model = rasa_ext.patch_model(model, config=LoraConfig(rank=8, alpha=16.0))
        >>> {row.R for row in rasa_ext.summary(model)}
        {8}
    """

    method: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "2106.09685"

    rank: int = option(8, "The rank r of every layer's change.")
    alpha: float = option(16.0, "The scale s is alpha / r.")
    rslora: bool = option(False, "Whether s is alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).")
    train_A: bool = option(
        True,
        "Whether A is trained. False is LoRA-FA (arXiv 2308.03303): A keeps the initial random "
        "values, and x is not stored for the backward.",
    )
    experts: str | None = option(
        None,
        "'own' also adapts the stacked (3-D) expert weights of mixtures of experts, with one A and "
        "one B for each expert. None does not adapt these weights.",
    )

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        checked_choice("experts", self.experts, (None, "own"))
        super().__post_init__()

    @property
    def scale(self) -> float:
        """The scale s of every layer's B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r, in) and B (out, r); A is a buffer if not trained.

        For stacked experts, A and B have the experts as the first dimension.
        """
        experts = (spec.experts,) if spec.experts else ()
        A = fresh_A(self.rank, spec, self.adapter_dtype, experts)
        B = fresh_B(self.rank, spec, self.adapter_dtype, experts)
        return {"A": A if self.train_A else A.detach(), "B": B}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return A and B, with s for every rank."""
        A = own["A"]
        return Factors(A, None, own["B"], None, A.new_full(A.shape[:-1], self.scale))


document_fields(LoraConfig)
