"""Parts: the matrices that an adapter changes, linear layers' weights and each expert's alike.

Those that are alike go through the operators over whole groups together, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import bank_weight
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.nn.rasa_experts import RasaBank, RasaExperts
from rasa_ext.ops import Factors
from rasa_ext.patching.state import adapted_experts

# Bytes of dW, in the dtype of the sums, that stand beside the model at a time. 64 MiB are 16
# million entries in float32, one 4096 x 4096 layer: enough for one product to fill any card, and
# little beside a model whose layers are worth taking together. A larger layer goes alone.
CHUNK_BYTES = 64 << 20


@dataclass(eq=False)
class Part:
    """One matrix that an adapter changes."""

    name: str
    weight: Tensor
    """(out, in), a view of the base's weight."""
    owner: RasaLinear | RasaExperts
    """What computes with it, and keeps what unmerging needs."""
    own_factors: Factors
    alike: Hashable
    """What it has in common with the parts that go into one product."""
    bank: str = ""
    """The stacked weight that it is a matrix of."""
    expert: int = 0

    @property
    def kept(self) -> Any:
        """What unmerging needs: the weight (out, in) or less, None while it is not merged."""
        if isinstance(self.owner, RasaLinear):
            return self.owner.merged_base
        return (self.owner.merged_base or {}).get((self.bank, self.expert))

    @kept.setter
    def kept(self, kept: Any) -> None:
        if isinstance(self.owner, RasaLinear):
            self.owner.merged_base = kept
            return
        every = self.owner.merged_base or {}
        if kept is None:
            every.pop((self.bank, self.expert), None)
        else:
            every[self.bank, self.expert] = kept
        self.owner.merged_base = every or None

    @property
    def base(self) -> nn.Module:
        """The module whose weight it is."""
        base: nn.Module = self.owner.base_layer
        return base


Chunk = list[Part]


def linear_part(name: str, layer: RasaLinear) -> Part:
    """Make the part of a linear layer."""
    weight = layer.base_layer.weight.detach()
    factors = layer.adapter().factors()
    alike = (layer.transposed, id(layer.pool))
    return Part(name, weight.t() if layer.transposed else weight, layer, factors, alike)


def bank_parts(name: str, experts: RasaExperts, key: str, bank: RasaBank) -> list[Part]:
    """Make the parts of a stacked weight, one for each expert."""
    factors, weights = bank.adapter().factors(), bank_weight(experts.base_layer, key).detach()
    return [
        Part(f"{name}[{i}]", weight, experts, factors.of_expert(i), id(bank), key, i)
        for i, weight in enumerate(weights)
    ]


def parts_of_experts(model: nn.Module) -> list[Part]:
    """Make the parts of all adapted experts of a model."""
    return [
        part
        for name, experts in adapted_experts(model)
        for key, bank in experts.banks().items()
        for part in bank_parts(f"{name}.{key}", experts, key, bank)
    ]


def chunks_of(parts: list[Part], dtype: torch.dtype | None = None) -> Iterator[Chunk]:
    """Cut ``parts`` into those that one product takes, alike and of at most CHUNK_BYTES of dW.

    ``dtype`` is that of dW, the one in which weights are summed unless given.
    """
    alike: dict[Hashable, Chunk] = {}
    for part in parts:
        base = (part.weight.dtype, part.weight.device)
        factors = [t for t in part.own_factors if t is not None]
        adapter = [(t.shape, t.dtype, t.device) for t in factors]
        alike.setdefault((*base, part.alike, *adapter), []).append(part)
    for found in alike.values():
        first = found[0].weight
        wide = dtype or ops.accumulation_dtype(first.dtype)
        step = max(1, CHUNK_BYTES // max(first.numel() * wide.itemsize, 1))
        yield from (found[begin : begin + step] for begin in range(0, len(found), step))


@torch.no_grad()
def packs_of(chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pack the parts of a chunk: Ap (L, R, in), Bp (L, R, out)."""
    factors = [part.own_factors for part in chunk]
    first = factors[0]
    if any(each.A_pool is not first.A_pool or each.d is None for each in factors):
        # Each reads ranks of its own from the pool, or the pool lies on another device.
        packs = [ops.pack(*each, dtype, 1) for each in factors]
        return torch.stack([Ap for Ap, _ in packs]), torch.stack([Bp for _, Bp in packs])
    A, _, B, _, d = zip(*factors, strict=True)
    return ops.pack_group(A, first.A_pool, B, first.B_pool, d, dtype, 1)


def deltas_of(chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """Compute dW (L, out, in) of the parts of a chunk."""
    return ops.delta_group(*packs_of(chunk, dtype))
