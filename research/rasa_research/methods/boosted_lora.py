"""Boosters as pairs of a layer's own: the present one is trained, those before it stay."""

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
    """The part that both methods of boosting share: the rank of a booster, and the stack."""

    paper: ClassVar[str] = "2410.19694"
    loop: ClassVar[str] = "rasa_research.training.Boosting, which begins new factors as it goes"

    rank: int = option(1, "r: the rank of a booster.")
    alpha: float = option(1.0, "A booster begins at the scale alpha / r.")
    stack: Mapping[str, int] | tuple[tuple[str, int], ...] = option(
        (),
        "How many ranks of former boosters each layer has. Boosting sets it.",
        counts=1,
    )

    @property
    def scale(self) -> float:
        """What the present booster's B A is multiplied with as it begins."""
        return self.alpha / self.rank

    def stacked(self, spec: LayerSpec) -> int:
        """Count the ranks of former boosters that a layer has."""
        return dict(self.stack).get(spec.name, 0)


@dataclasses.dataclass(frozen=True)
class BoostedLoraConfig(Boosted):
    """The config of a boosted LoRA (XGBLoRA, arXiv 2410.19694): dW = s B A + sum_t s B_t A_t.

    s = alpha / r. The pair A (r, in) and B (out, r) of the present booster is trained; the pairs
    of the boosters before stay, in the buffers stack_A (n, in) and stack_B (out, n) of the layer.
    ``rasa_research.training.Boosting`` begins one booster after the other.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Example:
        >>> from rasa_research.methods import BoostedLoraConfig
        >>> model = rasa_ext.patch_model(model, config=BoostedLoraConfig(rank=1, alpha=1.0))
        >>> {row.R for row in rasa_ext.summary(model)}
        {1}
    """

    method: ClassVar[str] = "boosted-lora"
    title: ClassVar[str] = "XGBLoRA"

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r, in) and B (out, r), and after the first booster buffers for the stack."""
        dtype = self.adapter_dtype
        own: dict[str, Tensor] = {
            "A": fresh_A(self.rank, spec, dtype),
            "B": fresh_B(self.rank, spec, dtype),
        }
        count = self.stacked(spec)
        return own | empty_stack(count, spec, dtype) if count else own

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Give A and B, and the stack as their pool, with s for every rank."""
        A, stack = own["A"], own.get("stack_A")
        d = A.new_full((len(A) + (0 if stack is None else len(stack)),), self.scale)
        return Factors(A, stack, own["B"], own.get("stack_B"), d)


document_fields(BoostedLoraConfig)
