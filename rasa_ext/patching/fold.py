"""The merge itself: add dW to the weights of parts, and undo that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

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


@dataclasses.dataclass
class Merging:
    """Options of a merge, and the reports it makes."""

    dtype: torch.dtype | None = None
    """Dtype of the dense weights that replace quantized ones; None: the dtype each layer states."""
    keep: bool = True
    """Whether anything is stored for unmerging."""
    changes: list[Dequantized] = dataclasses.field(default_factory=list)
    """Reports on the layers that became dense."""


@torch.no_grad()
def check_parts(parts: Sequence[Part], dtype: torch.dtype | None, argument: str) -> None:
    """Raise ValueError, before a merge, if a merged weight would not be finite.

    ``dtype`` is as in ``Merging``. The error begins with ``argument``. No part may be merged yet.
    """
    _check_not_packed(parts)
    for part in parts:
        if part.is_quantized:
            dequantized_sum(part, deltas_of([part])[0], dtype, argument)
    for chunk in _dense_chunks(parts):
        weights = [part.weight.clone() for part in chunk]
        _add(chunk, weights)
        check_finite(chunk, weights, argument)


@torch.no_grad()
def merge_parts(parts: Sequence[Part], merging: Merging, argument: str | None = None) -> float:
    """Add dW to the weights of all parts. After an error, no weight has changed.

    The sum is taken in float32 (float64 for float64 weights) and rounded once. If nothing is
    stored, a merge cannot be undone: call ``check_parts`` first.

    Args:
        parts: parts that are not merged.
        merging: the options. Reports on quantized layers are appended to it.
        argument: start of the error for a merged weight that is not finite. With None, dense
            weights are not checked.

    Returns:
        max |dW|, or 0 without ``argument``.
    """
    _check_not_packed(parts)
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
                    part.backup = part.weight.clone()
            packs = _add(chunk, weights)
            if argument is not None:
                check_finite(chunk, weights, argument)
                low, high = ops.delta_group(*packs).aminmax()
                largest = max(largest, -low.item(), high.item())
    except BaseException:  # not finite, out of memory, or interrupted
        unmerge_parts(parts)
        raise
    return largest


@torch.no_grad()
def unmerge_parts(parts: Sequence[Part]) -> None:
    """Restore the exact weights that merged parts had before the merge."""
    for part in parts:
        if isinstance(part.backup, nn.Module):
            restore_quantized(part.owner)
        elif part.backup is not None:
            part.weight.copy_(part.backup)
            part.backup = None


def _check_not_packed(parts: Iterable[Part]) -> None:
    """Raise ValueError if experts hold packed numbers, to which nothing can be added."""
    for part in parts:
        if part.expert is not None and part.weight.itemsize == 1:
            raise ValueError(
                f"model: the weight of {part.name!r} is packed as {part.weight.dtype}, and merging "
                "into it is not supported; load the adapter into a dequantized model, or export."
            )


def _dense_chunks(parts: Iterable[Part]) -> list[Chunk]:
    return list(chunks_of([part for part in parts if not part.is_quantized]))


def _add(chunk: Chunk, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Add dW to ``weights``, each (out, in), and return the packs that dW was made of."""
    packs = packs_of(chunk, ops.accumulation_dtype(weights[0].dtype))
    ops.merge_group(weights, *packs)
    # A compiled operator writes without autograd's knowledge. A backward through the old values
    # must still raise an error.
    torch.autograd.graph.increment_version(weights)
    return packs
