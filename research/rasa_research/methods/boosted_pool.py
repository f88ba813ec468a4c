"""Boosters in a pool: the layers of a group share each pair, and weight it by entries of d."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rasa_ext.methods import Factors, LayerSpec, document_fields, fresh_A, fresh_B, option
from rasa_research.methods.boosted_lora import Boosted
from rasa_research.methods.stack import empty_stack


@dataclasses.dataclass(frozen=True)
class BoostedPoolConfig(Boosted):
    """The config of boosters shared by a group's layers: XGBLoRA (arXiv 2410.19694) in a pool.

    dW_i = sum_t d_it b_t a_t. The current booster t trains its pair and, for every layer i, the
    entry d_it that weights the pair and starts at alpha / r. Former pairs are frozen.
    ``rasa_research.training.Boosting`` starts one booster after another. Each has r (in + out + L)
    parameters for L layers. A group owns A (r, in) and B (out, r) of the current booster and the
    buffers stack_A and stack_B of former ones. A layer owns d (r,) and stack_d (n,), one entry for
    each of the stack's n slots. Not in any paper.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import BoostedPoolConfig
        >>> from rasa_research.training import Boosting
        >>> model = rasa_ext.patch_model(model, config=BoostedPoolConfig())
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
        >>> boosting = Boosting(model, optimizer, steps=100)
    """

    method: ClassVar[str] = "boosted-pool"
    title: ClassVar[str] = "boosted pool (after XGBLoRA)"

    train_past: bool = option(
        False, "Whether to continue training the entries of d that weight former boosters."
    )

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make d (r,), and stack_d (n,) of zeros."""
        where: dict[str, Any] = {"dtype": self.adapter_dtype, "device": spec.device}
        past = torch.zeros(self.stacked(spec), **where)
        return {
            "d": nn.Parameter(torch.full((self.rank,), self.scale, **where)),
            "stack_d": nn.Parameter(past) if self.train_past else past,
        }

    def group_tensors(self, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
        """Make A (r, in) and B (out, r), and the buffers stack_A (n, in) and stack_B (out, n)."""
        first, dtype = specs[0], self.adapter_dtype
        return {
            "A": fresh_A(self.rank, first, dtype),
            "B": fresh_B(self.rank, first, dtype),
            **empty_stack(self.stacked(first), first, dtype),
        }

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return the stack as A and B, and the current booster as the pool."""
        d = torch.cat((own["stack_d"], own["d"]))
        A, A_now, B, B_now = (pool[name].to(d.device) for name in ("stack_A", "A", "stack_B", "B"))
        return Factors(A, A_now, B, B_now, d)


document_fields(BoostedPoolConfig)
