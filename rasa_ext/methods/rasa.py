"""RaSA: every layer gives k of its ranks to a pool, which it weights with its own diagonal."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from rasa_ext.methods.base import checked_choice, document_fields, option
from rasa_ext.methods.pooled import Kept, Pattern, PooledConfig

GROUPINGS = ("slot", "layer", "shared")
"""Which experts share a pool."""


@dataclasses.dataclass(frozen=True)
class RasaConfig(PooledConfig):
    """The config of one RaSA adapter (arXiv 2503.12576, section 3).

    A layer of weight (out, in) owns A (r-k, in), B (out, r-k) and d (r-k+L*k,), and its group of L
    layers A_pool (L*k, in) and B_pool (out, L*k): dW = [B | B_pool] diag(d) [A ; A_pool]. It is
    frozen, and each field's ``metadata["help"]`` has the text below.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Example:
        >>> config = rasa_ext.RasaConfig(rank=16, k=None, alpha=32.0)
        >>> config.k  # max(rank // 8, 1), the paper's choice
        2
        >>> model = rasa_ext.patch_model(model, config=config)
    """

    method: ClassVar[str] = "rasa"
    title: ClassVar[str] = "RaSA"
    paper: ClassVar[str] = "2503.12576"

    rank: int = option(8, "LoRA rank r per layer. Trainable parameters grow with it as in LoRA.")
    k: int | None = option(
        1,
        "How many of the r ranks every layer gives to its group's shared pool, 0 <= k <= rank; 0 "
        "is plain LoRA, None max(rank // 8, 1). The effective rank is r - k + L*k for L layers.",
    )
    alpha: float = option(
        8.0,
        "Sets the initial diagonal: alpha/2/(r-k) on the private and alpha/2/(L*k) on the pooled "
        "ranks. The diagonal is trained, so alpha acts at the start only.",
    )
    rank_pattern: Pattern = option(
        (),
        "Ranks r of single layers, by pattern: a regular expression that the end of a layer's name "
        "must match, from a dot on. k stays, so that they differ in their private ranks.",
        counts=1,
    )
    gates: str | None = option(
        None,
        "'pool' makes the pooled entries of d gates, which rasa_ext.training.ProximalGates drives "
        "to zero and rasa_ext.training.prune then takes out. It changes nothing by itself.",
    )
    experts: str | None = option(
        None,
        "Adapts the stacked (3-D) expert weights of mixtures of experts as well, and tells which "
        "of them share a pool: 'slot' the experts of one index over the layers, 'layer' those of "
        "one layer, 'shared' all of one name; there k = rank makes a pool-only adapter. None "
        "leaves them untouched.",
    )
    kept: Kept = option(
        (),
        "What pruning left of each layer's ranks. rasa_ext.training.prune sets it, and "
        "load_official where it makes one adapter of an expert's gate and up.",
        counts=3,
    )

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        self._check_ranks()
        checked_choice("gates", self.gates, (None, "pool"))
        checked_choice("experts", self.experts, (None, *GROUPINGS))
        if self.experts and self.gates:
            raise ValueError(
                f"gates: expected None beside experts={self.experts!r}, whose pools cannot be "
                f"pruned, got {self.gates!r}."
            )
        super().__post_init__()

    @property
    def grouping_of_experts(self) -> str | None:
        """Give the field ``experts``."""
        return self.experts

    def diagonal(self, own: int, pooled: int) -> Tensor:
        """Make alpha/2/own for private entries and alpha/2/pooled for those of the pool.

        Without a pool, as LoRA: alpha/own.
        """
        share = self.alpha / 2 if pooled else self.alpha
        return torch.cat([torch.full((n,), share / max(n, 1)) for n in (own, pooled)])

    def initial_diagonal(self, num_layers: int) -> Tensor:
        """Make d of a layer in a group of L layers: (r-k+L*k,) float32, private entries first."""
        return self.diagonal(*self.ranks(num_layers))

    def gate_entries(self, own: int, pooled: int) -> slice:
        """Tell which entries of d are gates: the pooled ones, with ``gates="pool"``."""
        return slice(own, own + pooled if self.gates else own)

    def gate_scale(self, num_layers: int) -> float:
        """Give the value that the pooled entries begin with, so that gates begin at one."""
        return self.alpha / 2 / max(self.ranks(num_layers)[1], 1)


document_fields(RasaConfig)
