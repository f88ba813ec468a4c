"""Plain PyTorch's own RaSA: the official formula, swapped into the same places of a model.

Its error against the float64 oracle is what every tolerance is measured by.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from oracle import Adapter
from torch import Tensor, nn
from torch.nn import functional as F


class PlainRasa(nn.Module):
    """base(x) + ((x [A ; A_pool]^T) * d) [B | B_pool]^T, the adapter cast to x's dtype."""

    def __init__(self, base: nn.Module, adapter: Adapter):
        super().__init__()
        self.base, self.adapter = base, adapter

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        cast = self.adapter.map(lambda t: t.to(result.dtype))
        down, up = cast.A, cast.B
        if cast.A_pool is not None:
            down, up = torch.cat([down, cast.A_pool]), torch.cat([up, cast.B_pool], dim=1)
        return result + F.linear(F.linear(x.to(result.dtype), down) * cast.d, up)


def leaves(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Copies that require grad; tensors shared between layers stay shared."""
    seen: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            seen[id(tensor)] = copy.copy(tensor.detach().clone()).requires_grad_()
        return seen[id(tensor)]

    return {name: adapter.map(leaf) for name, adapter in adapters.items()}


def refresh(leaves: Mapping[str, Adapter], adapters: Mapping[str, Adapter]) -> None:
    """Give the copies that ``leaves`` made the values that ``adapters`` have by now."""
    with torch.no_grad():
        for name, adapter in adapters.items():
            for field in dataclasses.fields(adapter):
                value = getattr(adapter, field.name)
                if value is not None:
                    getattr(leaves[name], field.name).copy_(value)


def plain_model(base: nn.Module, adapters: Mapping[str, Adapter]) -> nn.Module:
    """A copy of ``base`` with PlainRasa in place of every layer that ``adapters`` names."""
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    modules = {}  # one wrapper per module, also where the model registers it under two names
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        modules[id(module)] = PlainRasa(module, adapter)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in modules and not isinstance(parent, PlainRasa):
                setattr(parent, key, modules[id(child)])
    return model
