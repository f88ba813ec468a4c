"""XGBLoRA: each layer trains the pair of the current booster; former pairs are frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rasa_ext.methods import (
    AdapterConfig,
    Factors,
    LayerSpec,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)
from rasa_research.methods.stack import empty_stack


@dataclasses.dataclass(frozen=True)
class Boosted(AdapterConfig):
    """Fields of both boosting methods: the booster's rank and scale, and the stack."""

    paper: ClassVar[str] = "2410.19694"
    loop: ClassVar[str] = "rasa_research.training.Boosting"

    rank: int = option(1, "The rank r of a booster.")
    alpha: float = option(1.0, "A booster starts at the scale alpha / r.")
    stack: Mapping[str, int] | tuple[tuple[str, int], ...] = option(
        (),
        "Number of ranks of former boosters, by layer. Boosting sets it.",
        counts=1,
    )

    @property
    def scale(self) -> float:
        """Initial factor on B A of the current booster."""
        return self.alpha / self.rank

    def stacked(self, spec: LayerSpec) -> int:
        """Return how many ranks of former boosters a layer has."""
        return dict(self.stack).get(spec.name, 0)


@dataclasses.dataclass(frozen=True)
class BoostedLoraConfig(Boosted):
    """The config of a boosted LoRA (XGBLoRA, arXiv 2410.19694): dW = s B A + sum_t s B_t A_t.

    s = alpha / r. Only A (r, in) and B (out, r) of the current booster are trained. The pairs of
    former boosters are frozen in the layer's buffers stack_A (n, in) and stack_B (out, n).
    ``rasa_research.training.Boosting`` starts one booster after another.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import BoostedLoraConfig
        >>> model = rasa_ext.patch_model(model, config=BoostedLoraConfig(rank=1, alpha=1.0))
        >>> {row.R for row in rasa_ext.summary(model)}
        {1}
    """

    method: ClassVar[str] = "boosted-lora"
    title: ClassVar[str] = "XGBLoRA"

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r, in), B (out, r) and, after the first booster, buffers for the stack."""
        dtype = self.adapter_dtype
        own: dict[str, Tensor] = {
            "A": fresh_A(self.rank, spec, dtype),
            "B": fresh_B(self.rank, spec, dtype),
        }
        count = self.stacked(spec)
        return own | empty_stack(count, spec, dtype) if count else own

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return A and B, the stack as their pool, and s for every rank."""
        A, stack = own["A"], own.get("stack_A")
        d = A.new_full((len(A) + (0 if stack is None else len(stack)),), self.scale)
        return Factors(A, stack, own["B"], own.get("stack_B"), d)


document_fields(BoostedLoraConfig)
