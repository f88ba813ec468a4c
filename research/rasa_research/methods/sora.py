"""SoRA: a LoRA with a gate for each rank, which training may close."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from rasa_ext.methods import LayerSpec, Rate, document_fields, option
from rasa_research.methods.gated_rasa import GatedRasaConfig


@dataclasses.dataclass(frozen=True)
class SoraConfig(GatedRasaConfig):
    """The config of a SoRA (arXiv 2311.11696): dW = s B diag(g) A with trained gates g.

    A layer stores d = s g, s = alpha / r. For d to move like s g under Adam, without gradient
    clipping, it needs s times the learning rate and 1 / s times epsilon:
    ``rasa_ext.training.parameter_groups`` sets both. Gates are initialized from N(0, 1).
    ``rasa_research.training.ProximalGates`` drives them to zero, and ``prune`` removes the ranks of
    closed gates.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import SoraConfig
        >>> model = rasa_ext.patch_model(model, config=SoraConfig(rank=8))
        >>> from rasa_research.training import ProximalGates
        >>> gates = ProximalGates(model, threshold=1e-3)
    """

    method: ClassVar[str] = "sora"
    title: ClassVar[str] = "SoRA"
    paper: ClassVar[str] = "2311.11696"

    rank: int = option(8, "The initial rank r of every layer.")
    k: int | None = option(
        0, "Number of the r ranks that every layer gives to a pool, as in RaSA. The paper has 0."
    )
    alpha: float = option(16.0, "The scale s is alpha / r.")

    def diagonal(self, spec: LayerSpec) -> Tensor:
        """Draw d = s g with g from N(0, 1)."""
        return torch.randn(sum(self.ranks_at(spec))) * (self.alpha / self.rank)

    def learning_rates(self, spec: LayerSpec) -> dict[str, Rate]:
        """Return factors for d, so it moves like s g under Adam: s on the rate, 1/s on epsilon."""
        s = self.gate_scale(spec.num_layers)
        found = super().learning_rates(spec)
        return {n: r._replace(lr=s * r.lr, eps=1 / s) for n, r in found.items()}

    def gate_entries(self, own: int, pooled: int) -> slice:
        """Return all entries of d, since each is a gate."""
        return slice(0, own + pooled)

    def gate_scale(self, num_layers: int) -> float:
        """Return s."""
        return self.alpha / self.rank


document_fields(SoraConfig)
