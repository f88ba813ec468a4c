"""Exact unmerging by subtraction.

``round(round(W + dW) - dW)``, summed in float32, is W wherever the merged entry is no coarser than
W's own. It fails only for entries that dW lifts to a larger power of two. Merging stores these
entries, in place of a copy of the whole weight.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class MergeResidual:
    """The entries of a weight (out, in) that subtraction does not restore."""

    index: Tensor
    """(n,) indices into the flattened weight: int32, or int64 in a huge weight."""
    value: Tensor
    """(n,) original values, in the weight's dtype."""
    sum: Tensor
    """() int64 checksum of the weight's bits, which ``original`` compares."""

    def original(self, merged: Tensor, delta: Tensor) -> Tensor:
        """Restore the weight (out, in) as it was before ``delta`` (out, in) was added.

        Raises RuntimeError if the result is not that weight.
        """
        weight, device = _subtracted(merged, delta), merged.device
        weight.view(-1)[self.index.to(device).long()] = self.value.to(device)
        if checksum(weight) != self.sum.to(device):
            raise RuntimeError(
                "subtracting the adapter does not restore the weight from before the merge: the "
                "adapter, the weight or the device has changed since; undo that change and unmerge "
                "again, or load the base again. To allow such changes, merge without subtract, "
                "which stores a copy of the weight."
            )
        return weight


def residual_of(weight: Tensor, merged: Tensor, delta: Tensor) -> MergeResidual | Tensor:
    """Return the residual of ``weight``, or a copy of it where that is smaller; all (out, in)."""
    wrong = (_bits(_subtracted(merged, delta)) != _bits(weight)).flatten()
    small = wrong.numel() <= torch.iinfo(torch.int32).max
    index = wrong.nonzero().flatten().to(torch.int32 if small else torch.int64)
    if index.numel() * (index.itemsize + weight.itemsize) >= weight.nbytes:
        return weight.detach().clone()
    return MergeResidual(index, weight.flatten()[index.long()], checksum(weight))


def _subtracted(merged: Tensor, delta: Tensor) -> Tensor:
    return (merged.to(delta.dtype) - delta).to(merged.dtype).contiguous()


def _bits(weight: Tensor) -> Tensor:
    """View a weight as integers, where the sign of a zero counts and NaN equals itself."""
    return weight.detach().contiguous().view(_BITS[weight.itemsize])


def checksum(weight: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as integers: () int64."""
    return _bits(weight).sum(dtype=torch.int64)
