"""Frozen factors of former tasks or boosters, in buffers of a layer or a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.methods import LayerSpec


def empty_stack(rank: int, spec: LayerSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make zero buffers for frozen factors: stack_A (n, in), stack_B (out, n)."""
    shapes = (rank, spec.in_features), (spec.out_features, rank)
    down, up = (torch.zeros(shape, dtype=dtype, device=spec.device) for shape in shapes)
    return {"stack_A": down, "stack_B": up}


def pushed(tensors: dict[str, Tensor], down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return the stack in ``tensors``, if there is one, with A (r, in) and B (out, r) appended."""
    downs, ups = [down.detach()], [up.detach()]
    if "stack_A" in tensors:
        downs, ups = [tensors["stack_A"], *downs], [tensors["stack_B"], *ups]
    return {"stack_A": torch.cat(downs), "stack_B": torch.cat(ups, 1)}
