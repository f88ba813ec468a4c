"""RaSA: every layer gives k of its ranks to a pool, which it weights with its own diagonal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rasa_ext.methods.base import (
    AdapterConfig,
    Place,
    checked_integer,
    checked_number,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)


@dataclasses.dataclass(frozen=True)
class RasaConfig(AdapterConfig):
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

    peft_type: ClassVar[str] = "RASA"

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

    def __post_init__(self) -> None:
        """Check every field and bring it into its canonical form."""
        rank = checked_integer("rank", self.rank)
        if rank < 1:
            raise ValueError(f"rank: expected an integer >= 1, got {rank}.")
        k = _usual_k(rank) if self.k is None else checked_integer("k", self.k)
        if not 0 <= k <= rank:
            raise ValueError(f"k: expected 0 <= k <= rank (rank is {rank}), got {k}.")
        alpha = checked_number("alpha", self.alpha)
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number above 0, got {alpha}.")
        self._set(rank=rank, k=k, alpha=alpha)
        super().__post_init__()

    def own(self, place: Place) -> dict[str, Tensor]:
        """Make A (r-k, in), B (out, r-k) and d (r-k+L*k,), all trained."""
        rank, dtype = self.ranks(place.num_layers)[0], self.adapter_dtype
        d = self.initial_diagonal(place.num_layers).to(place.device, dtype)
        return {
            "A": fresh_A(rank, place, dtype),
            "B": fresh_B(rank, place, dtype),
            "d": nn.Parameter(d),
        }

    def pool(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Make A (L*k, in) and B (out, L*k); nothing where k = 0."""
        size, first, dtype = self.ranks(len(places))[1], places[0], self.adapter_dtype
        if not size:
            return {}
        return {"A": fresh_A(size, first, dtype), "B": fresh_B(size, first, dtype)}

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values under the names of the official code."""
        return {
            **super().to_dict(),
            "r": self.rank,
            "rasa_k": self.k,
            "rasa_alpha": self.alpha,
            "rasa_dropout": self.dropout,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RasaConfig:
        """Read what ``to_dict``, or the official code, wrote.

        Raises:
            ValueError: the file is not a RaSA adapter's, asks for a trained bias, or lacks a field.
        """
        common = cls.common_from_dict(data)
        missing = [key for key in ("r", "rasa_k", "target_modules") if data.get(key) is None]
        if missing:
            raise ValueError(f"adapter_config.json: {', '.join(missing)} missing.")
        return cls(
            rank=data["r"],
            k=data["rasa_k"],
            alpha=data.get("rasa_alpha", 8.0),
            dropout=data.get("rasa_dropout", 0.0),
            **common,
        )

    def ranks(self, num_layers: int) -> tuple[int, int]:
        """Count a layer's private and pooled ranks in a group of L layers: r-k and L*k."""
        k = _usual_k(self.rank) if self.k is None else self.k
        return self.rank - k, num_layers * k

    def initial_diagonal(self, num_layers: int) -> Tensor:
        """Make d of a layer in a group of L layers: (r-k+L*k,) float32, private entries first."""
        own, pooled = self.ranks(num_layers)
        share = self.alpha if 0 in (own, pooled) else self.alpha / 2
        values = [share / n for n in (own, pooled) for _ in range(n)]
        return torch.tensor(values, dtype=torch.float32)


def _usual_k(rank: int) -> int:
    """Give the paper's choice of k for a rank, which None stands for."""
    return max(rank // 8, 1)


document_fields(RasaConfig)
