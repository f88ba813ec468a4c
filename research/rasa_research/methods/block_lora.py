"""Block-LoRA: blocks of ranks share one A. It equals a LoRA with a higher learning rate for B."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rasa_ext.methods import (
    AdapterConfig,
    Factors,
    LayerSpec,
    Rate,
    checked_integer,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)


@dataclasses.dataclass(frozen=True)
class BlockLoraConfig(AdapterConfig):
    """The config of a Block-LoRA (arXiv 2501.16720): n blocks B_i share one A of rank r / n.

    dW = s (B_1 + ... + B_n) A with A (r/n, in) and B_i (out, r/n), s = alpha / r. All blocks start
    at zero. An optimizer that treats all parameters alike then gives them equal steps, so they stay
    equal. This package stores only their sum, B, which needs n times the learning rate:
    ``rasa_ext.training.parameter_groups`` sets it. The paper does not specify initialisation and
    scale; this package chooses them.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import BlockLoraConfig
        >>> config = BlockLoraConfig(rank=8, blocks=4)
        >>> model = rasa_ext.patch_model(model, config=config)
        >>> groups = rasa_ext.training.parameter_groups(model, lr=1e-3)
        >>> sorted(group["lr"] for group in groups)
        [0.001, 0.004]
    """

    method: ClassVar[str] = "block-lora"
    title: ClassVar[str] = "Block-LoRA"
    paper: ClassVar[str] = "2501.16720"

    rank: int = option(8, "r, the sum of the blocks' ranks. The rank of dW is r / n.")
    alpha: float = option(16.0, "The scale s is alpha / r.")
    blocks: int = option(2, "n, the number of blocks that share A. It must divide the rank.")

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        super().__post_init__()
        if checked_integer("blocks", self.blocks) < 1 or self.rank % self.blocks:
            raise ValueError(
                f"blocks: expected a divisor of the rank, which is {self.rank}, got {self.blocks}."
            )

    def learning_rates(self, spec: LayerSpec) -> dict[str, Rate]:
        """Return factors for B: n on the learning rate, 1 / n on weight decay.

        AdamW multiplies the decay by the learning rate, so 1 / n leaves the product unchanged.
        """
        return {"B": Rate(lr=self.blocks, weight_decay=1 / self.blocks)}

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make A (r/n, in) and B (out, r/n), the sum of the blocks."""
        rank, dtype = self.rank // self.blocks, self.adapter_dtype
        return {"A": fresh_A(rank, spec, dtype), "B": fresh_B(rank, spec, dtype)}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return A and B, with s for every rank."""
        A = own["A"]
        return Factors(A, None, own["B"], None, A.new_full((A.shape[0],), self.alpha / self.rank))


document_fields(BlockLoraConfig)
