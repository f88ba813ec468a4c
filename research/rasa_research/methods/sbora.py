"""SBoRA: one factor is rows of the identity, so the other reads or writes single features."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rasa_ext.methods import (
    AdapterConfig,
    Factors,
    LayerSpec,
    checked_choice,
    checked_integer,
    document_fields,
    fresh_B,
    option,
)


@dataclasses.dataclass(frozen=True)
class SboraConfig(AdapterConfig):
    """The config of an SBoRA (arXiv 2407.05413): y = W x + s B x[I], or y[J] += s A x.

    With side "A" (SBoRA-FA), a trained B (out, r) reads r features I of x, and the backward does
    not need the rest of x. With side "B" (FB), a trained A (r, in) writes r features J of y. The
    buffer ``index`` holds I or J. s = alpha / r.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import SboraConfig
        >>> model = rasa_ext.patch_model(model, config=SboraConfig(rank=4, side="A"))
        >>> layer = next(m for m in model.modules() if isinstance(m, rasa_ext.RasaLinear))
        >>> layer.index.shape, layer.B.shape == (layer.out_features, 4)
        (torch.Size([4]), True)
    """

    method: ClassVar[str] = "sbora"
    title: ClassVar[str] = "SBoRA"
    paper: ClassVar[str] = "2407.05413"

    rank: int = option(
        8, "r, the number of features that are read or written; at most the layer's width."
    )
    alpha: float = option(16.0, "The scale s is alpha / r.")
    side: str = option(
        "A", "Which factor is rows of the identity: 'A' reads features, 'B' writes them."
    )
    indices: str = option(
        "random",
        "How to choose the features: 'random', or 'activation', the largest activations that "
        "rasa_research.training.calibrate measures. Before that call they are random.",
    )
    seed: int = option(0, "Seed of the random choice, which differs from layer to layer.")

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        checked_choice("side", self.side, ("A", "B"))
        checked_choice("indices", self.indices, ("random", "activation"))
        if self.indices == "activation" and self.side == "B":
            raise ValueError(
                "indices: expected 'random' with side 'B', which reads all of x, got 'activation'."
            )
        if not 0 <= checked_integer("seed", self.seed) < 1 << 62:
            raise ValueError(f"seed: expected an integer >= 0 of 62 bits, got {self.seed}.")
        super().__post_init__()

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make index (r,) and, filled with zeros, B (out, r) or A (r, in)."""
        reads = self.side == "A"
        features = spec.in_features if reads else spec.out_features
        if self.rank > features:
            raise ValueError(
                f"rank: expected at most the {features} {'inputs' if reads else 'outputs'} of "
                f"{spec.name or 'a layer'!r}, got {self.rank}."
            )
        dtype, device = self.adapter_dtype, spec.device
        zeros = torch.zeros((self.rank, spec.in_features), dtype=dtype, device=device)
        return {
            "index": self._drawn(features, spec.name).to(device),
            **({"B": fresh_B(self.rank, spec, dtype)} if reads else {"A": nn.Parameter(zeros)}),
        }

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return the trained factor, the other as rows of the identity, and s for every rank."""
        trained, index = own.get("A", own.get("B")), own["index"]
        if trained is None:
            raise KeyError("A or B")
        features = spec.in_features if self.side == "A" else spec.out_features
        rows = trained.new_zeros((self.rank, features))
        rows.scatter_(1, index.unsqueeze(1), 1.0)
        d = trained.new_full((self.rank,), self.alpha / self.rank)
        if self.side == "A":
            return Factors(rows, None, trained, None, d)
        return Factors(trained, None, rows.t(), None, d)

    def _drawn(self, features: int, name: str) -> Tensor:
        """Draw r of the features, equal on every process."""
        generator = torch.Generator().manual_seed(self.seed + (zlib.crc32(name.encode()) << 16))
        return torch.randperm(features, generator=generator)[: self.rank].sort().values


document_fields(SboraConfig)
