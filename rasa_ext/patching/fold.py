"""The one merge: dW of parts added to their weights, and taken out of them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.patching.merge_quantized import (
    Dequantized,
    dequantize_and_merge,
    dequantized_sum,
    restore_quantized,
)
from rasa_ext.patching.parts import Chunk, Part, check_finite, chunks_of, deltas_of, packs_of
from rasa_ext.patching.subtraction import MergeResidual, residual_of


@dataclasses.dataclass
class Merging:
    """How a merge is done, and what it reports."""

    dtype: torch.dtype | None = None
    """Of the dense weights that quantized ones become; None: as the layers themselves say."""
    subtract: bool = False
    """Whether unmerging subtracts, so that no copy of the weights is kept."""
    keep: bool = True
    """Whether anything is kept for unmerging."""
    changes: list[Dequantized] = dataclasses.field(default_factory=list)
    """The layers that became dense."""


@torch.no_grad()
def check_parts(parts: Sequence[Part], dtype: torch.dtype | None, argument: str) -> None:
    """Raise ValueError, before a merge, where a merged weight would not be finite.

    ``dtype`` is that of ``Merging``. The error begins with ``argument``. No part is merged yet.
    """
    for part in parts:
        if part.is_quantized:
            dequantized_sum(part, deltas_of([part])[0], dtype, argument)
    for chunk in _dense_chunks(parts):
        weights = [part.weight.clone() for part in chunk]
        _add(chunk, weights)
        check_finite(chunk, weights, argument)


@torch.no_grad()
def merge_parts(parts: Sequence[Part], merging: Merging, argument: str | None = None) -> float:
    """Add dW to the weights of all parts; after an error, to none.

    The sum is taken in float32 (float64 for float64 weights) and rounded once. Nothing can be
    undone where nothing is kept: call ``check_parts`` first.

    Args:
        parts: none of them merged.
        merging: how; the report on quantized layers is added to it.
        argument: how the error begins where a merged weight is not finite. With None, dense
            weights are not checked.

    Returns:
        max |dW|, or 0 without an argument.
    """
    largest = 0.0
    try:
        for part in (part for part in parts if part.is_quantized):
            delta = deltas_of([part])[0]
            largest = max(largest, delta.abs().max().item())
            change = dequantize_and_merge(part, delta, merging.dtype, argument or "model")
            merging.changes.append(change)
        for chunk in _dense_chunks(parts):
            weights = [part.weight for part in chunk]
            if merging.keep:
                for part in chunk:
                    part.kept = part.weight.clone()
            packs = _add(chunk, weights)
            if argument is None and not merging.subtract:
                continue
            deltas = ops.delta_group(*packs)
            if argument is not None:
                check_finite(chunk, weights, argument)
                low, high = deltas.aminmax()
                largest = max(largest, -low.item(), high.item())
            if merging.keep and merging.subtract:
                for part, delta in zip(chunk, deltas, strict=True):
                    part.kept = residual_of(part.kept, part.weight, delta)
    except BaseException:  # not finite, out of memory, or an interrupt
        unmerge_parts(parts)
        raise
    return largest


@torch.no_grad()
def unmerge_parts(parts: Sequence[Part]) -> None:
    """Give those parts that are merged the exact weights they had before.

    Raises RuntimeError where unmerging subtracts, and an adapter has changed since; all parts stay
    merged then.
    """
    undone: list[tuple[Chunk, list[Any]]] = []
    try:
        for chunk in _dense_chunks(parts):  # as merging had them: others round otherwise
            kept = [part.kept for part in chunk]
            originals = list(kept)
            if any(isinstance(each, MergeResidual) for each in kept):
                for i, delta in enumerate(deltas_of(chunk)):
                    if isinstance(kept[i], MergeResidual):
                        originals[i] = kept[i].original(chunk[i].weight, delta)
            undone.append((chunk, kept))
            for part, original in zip(chunk, originals, strict=True):
                if original is not None:
                    part.weight.copy_(original)
                part.kept = None
    except RuntimeError:
        for chunk, kept in undone:
            _add(chunk, [part.weight for part in chunk])
            for part, each in zip(chunk, kept, strict=True):
                part.kept = each
        raise
    for part in parts:
        if isinstance(part.kept, nn.Module):
            restore_quantized(part.owner)


def _dense_chunks(parts: Iterable[Part]) -> list[Chunk]:
    return list(chunks_of([part for part in parts if not part.is_quantized]))


def _add(chunk: Chunk, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Add dW to ``weights``, each (out, in), and give the packs of which it is made."""
    packs = packs_of(chunk, ops.accumulation_dtype(weights[0].dtype))
    ops.merge_group(weights, *packs)
    # A compiled operator writes without autograd's knowledge; a backward through the old values
    # must still be refused.
    torch.autograd.graph.increment_version(weights)
    return packs
