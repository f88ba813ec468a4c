"""ResLoRA's block shortcut: every layer also applies the LoRAs of layers before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rasa_ext.methods import (
    AdapterConfig,
    Factors,
    LayerSpec,
    checked_choice,
    checked_integer,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)


@dataclasses.dataclass(frozen=True)
class ResLoraConfig(AdapterConfig):
    """The config of a ResLoRA with block shortcuts ("bs", arXiv 2402.18039).

    Layer n of a group computes dW_n = s (B_n A_n + B_n-1 A_n-1 + ... + B_n-m A_n-m), with one LoRA
    of rank r per layer and s = alpha / r. The group owns the LoRAs as ``A0``, ``B0``, ``A1``, ...
    Layer n reads LoRA n and up to m LoRAs before it, so merging is exact and the effective rank is
    r (m + 1). The shortcuts "is" and "ms" are not available: they add inputs of other layers, which
    no weight change can express. Dropout draws one mask per layer; the official code draws one per
    term.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given.

    Example:
        >>> from rasa_research.methods import ResLoraConfig
        >>> model = rasa_ext.patch_model(model, config=ResLoraConfig(rank=4, window=1))
        >>> {row.R for row in rasa_ext.summary(model)}  # 4 ranks of its own, 4 of the one before
        {8}
    """

    method: ClassVar[str] = "reslora"
    title: ClassVar[str] = "ResLoRA"
    paper: ClassVar[str] = "2402.18039"

    rank: int = option(8, "The rank r of every layer's own LoRA.")
    alpha: float = option(16.0, "The scale s is alpha / r.")
    window: int = option(4, "m, the number of preceding layers whose LoRAs a layer also computes.")
    shortcut: str = option("bs", "The kind of shortcut; the paper's 'is' and 'ms' are refused.")

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form."""
        if self.shortcut in ("is", "ms"):
            raise ValueError(
                f"shortcut: expected 'bs', got {self.shortcut!r}, which adds a term in the input "
                "of another layer; no change of this layer's weight can do that, so the adapter "
                "could not be merged exactly, exported or served."
            )
        checked_choice("shortcut", self.shortcut, ("bs",))
        if checked_integer("window", self.window) < 0:
            raise ValueError(f"window: expected an integer >= 0, got {self.window}.")
        super().__post_init__()

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Return no tensors: the group owns the LoRAs of all layers."""
        return {}

    def group_tensors(self, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
        """Make A_i (r, in) and B_i (out, r) of every layer i of the group."""
        tensors: dict[str, Tensor] = {}
        for i, spec in enumerate(specs):
            tensors[f"A{i}"] = fresh_A(self.rank, spec, self.adapter_dtype)
            tensors[f"B{i}"] = fresh_B(self.rank, spec, self.adapter_dtype)
        return tensors

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return the layer's LoRA, the LoRAs before it as the pool, and s for every rank."""
        window = range(spec.index, max(spec.index - self.window, 0) - 1, -1)
        A, *before = (pool[f"A{i}"] for i in window)
        B, *up = (pool[f"B{i}"] for i in window)
        d = A.new_full((len(window) * self.rank,), self.alpha / self.rank)
        if not before:
            return Factors(A, None, B, None, d)
        return Factors(A, torch.cat(before), B, torch.cat(up, 1), d)


document_fields(ResLoraConfig)
