"""LoRA, for comparisons over one implementation: a pair of factors a layer at a fixed scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rasa_ext.methods.base import (
    AdapterConfig,
    Counts,
    Place,
    Rate,
    checked_alpha,
    checked_choice,
    checked_counts,
    checked_integer,
    checked_rank,
    document_fields,
    empty_stack,
    fresh_A,
    fresh_B,
    option,
)
from rasa_ext.ops import Factors


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """The config of a LoRA (arXiv 2106.09685): dW = s B A, s = alpha / r, of A and B a layer.

    ``RasaConfig(k=0)`` is not the same: it trains a diagonal in the place of s.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

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
        "Whether A is trained. False is LoRA-FA (arXiv 2308.03303): A stays as drawn, and x is not "
        "kept for the backward.",
    )
    experts: str | None = option(
        None,
        "'own' adapts the stacked (3-D) expert weights of mixtures of experts as well: every "
        "expert has an A and a B of its own. None leaves them untouched.",
    )
    stack: Counts = option(
        (), "How many ranks each layer's stack has. rasa_ext.training.Boosting sets it."
    )

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        stack = checked_counts("stack", self.stack)
        self._set(rank=checked_rank(self.rank), alpha=checked_alpha(self.alpha), stack=stack)
        checked_choice("experts", self.experts, (None, "own"))
        super().__post_init__()

    @property
    def grouping_of_experts(self) -> str | None:
        """Give the field ``experts``."""
        return self.experts

    @property
    def scale(self) -> float:
        """s, with which every layer's B A is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def own(self, place: Place) -> dict[str, Tensor]:
        """Make A (r, in) and B (out, r), and buffers for the stack; A is one if not trained.

        Of stacked experts A and B have these as their first dimension.
        """
        experts = (place.experts,) if place.experts else ()
        A = fresh_A(self.rank, place, self.adapter_dtype, experts)
        own: dict[str, Tensor] = {
            "A": A if self.train_A else A.detach(),
            "B": fresh_B(self.rank, place, self.adapter_dtype, experts),
        }
        if count := dict(self.stack).get(place.name):
            own |= empty_stack(count, place, self.adapter_dtype)
        return own

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], place: Any) -> Factors:
        """Give A and B with s for every rank, and the stack as its pool, at the same scale."""
        A, stack = own["A"], own.get("stack_A")
        rank = A.shape[-2] + (0 if stack is None else stack.shape[0])
        d = A.new_full((*A.shape[:-2], rank), self.scale)
        return Factors(A, stack, own["B"], own.get("stack_B"), d)


@dataclasses.dataclass(frozen=True)
class BlockLoraConfig(AdapterConfig):
    """The config of a Block-LoRA (arXiv 2501.16720): n blocks B_i share one A of rank r / n.

    dW = s (B_1 + ... + B_n) A with A (r/n, in) and B_i (out, r/n), s = alpha / r. From zeros and
    under an optimizer that treats every number alike, the blocks get one gradient and stay equal,
    so that this keeps their sum alone, as B, which then moves n times as fast:
    ``rasa_ext.training.parameter_groups`` gives B that rate. The paper leaves its initialisation
    and its scale open; they are this package's choice.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Example:
        >>> from rasa_ext.methods import BlockLoraConfig
        >>> config = BlockLoraConfig(rank=8, blocks=4)
        >>> model = rasa_ext.patch_model(model, config=config)
        >>> groups = rasa_ext.training.parameter_groups(model, lr=1e-3)
        >>> sorted(group["lr"] for group in groups)
        [0.001, 0.004]
    """

    method: ClassVar[str] = "block-lora"
    title: ClassVar[str] = "Block-LoRA"
    paper: ClassVar[str] = "2501.16720"
    peft: ClassVar[str] = "its B needs a learning rate of its own"

    rank: int = option(8, "r: all blocks' ranks together. The rank of dW is r / n.")
    alpha: float = option(16.0, "The scale s is alpha / r.")
    blocks: int = option(2, "n, the blocks that share A; it divides the rank.")

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        rank, blocks = checked_rank(self.rank), checked_integer("blocks", self.blocks)
        if blocks < 1 or rank % blocks:
            raise ValueError(
                f"blocks: expected a divisor of the rank, which is {rank}, got {blocks}."
            )
        self._set(rank=rank, blocks=blocks, alpha=checked_alpha(self.alpha))
        super().__post_init__()

    def learning_rates(self, place: Place) -> dict[str, Rate]:
        """Let B, the sum of n blocks, move n times as fast; the rate multiplies its decay."""
        return {"B": Rate(lr=self.blocks, weight_decay=1 / self.blocks)}

    def own(self, place: Place) -> dict[str, Tensor]:
        """Make A (r/n, in) and the blocks' sum B (out, r/n)."""
        rank, dtype = self.rank // self.blocks, self.adapter_dtype
        return {"A": fresh_A(rank, place, dtype), "B": fresh_B(rank, place, dtype)}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], place: Any) -> Factors:
        """Give A and B, and s for every rank."""
        A = own["A"]
        return Factors(A, None, own["B"], None, A.new_full((A.shape[0],), self.alpha / self.rank))


document_fields(LoraConfig)
document_fields(BlockLoraConfig)
