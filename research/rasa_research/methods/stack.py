"""Frozen factors of former tasks or boosters, in buffers of a layer or a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.methods import LayerSpec


def empty_stack(rank: int, spec: LayerSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make zero buffers for frozen factors: stack_A (n, in), stack_B (out, n)."""
    down, up = (
        torch.zeros((rank, width), dtype=dtype, device=spec.device)
        for width in (spec.in_features, spec.out_features)
    )
    return {"stack_A": down, "stack_B": up.t()}


def pushed(tensors: dict[str, Tensor], down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return the stack in ``tensors``, if there is one, with A (r, in) and B (out, r) appended."""
    rows = [down.detach().clone()], [up.detach().t().clone()]
    if "stack_A" in tensors:
        rows = [tensors["stack_A"], *rows[0]], [tensors["stack_B"].t(), *rows[1]]
    return {"stack_A": torch.cat(rows[0]), "stack_B": torch.cat(rows[1]).t()}
