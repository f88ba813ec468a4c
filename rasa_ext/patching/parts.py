"""Parts: the matrices that adapters change, which are linear layers and single experts.

Parts with equal keys go through the group operators together, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.experts import expert_weight
from rasa_ext.base_layers.linear import stored_weight
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.adapter import Adapter
from rasa_ext.nn.packs import pack_layers
from rasa_ext.ops import Factors

# Bytes of dW, in the dtype of the sums, that are in memory at a time. 64 MiB are 16 million
# float32 entries, one 4096 x 4096 layer: enough for one product to fill any card, and little
# beside a model whose layers are worth grouping. A larger layer goes alone.
CHUNK_BYTES = 64 << 20


@dataclass(eq=False)
class Part:
    """One matrix that adapters change, and where the data for unmerging is stored."""

    name: str
    base: Any
    """The module that holds the weight."""
    weight: Tensor
    """(out, in), a view of the base's weight; for a quantized base, the stored weight."""
    factors: tuple[Factors, ...]
    """One per adapter; their changes add up."""
    alike: Hashable
    """Key that is equal for parts that can go into one product."""
    owner: Any
    """The module whose ``merged_base`` holds the data for unmerging; None while not merged. For
    experts it is a dict, by weight name and expert."""
    expert: tuple[str, int] | None = None

    @property
    def backup(self) -> Any:
        """The weight (out, in) before the merge, or the quantized layer; None while not merged."""
        before = self.owner.merged_base
        return before if self.expert is None else (before or {}).get(self.expert)

    @backup.setter
    def backup(self, before: Any) -> None:
        if self.expert is None:
            self.owner.merged_base = before
            return
        every = self.owner.merged_base or {}
        every[self.expert] = before
        if before is None:
            del every[self.expert]
        self.owner.merged_base = every or None

    @property
    def is_quantized(self) -> bool:
        """Whether the base is quantized, or a dense layer that replaces a quantized one."""
        if self.expert is not None:
            return False
        return isinstance(self.backup, nn.Module) or format_of(self.base) is not None


Chunk = list[Part]


def linear_part(name: str, layer: AdaptedLinear, adapters: Sequence[Adapter]) -> Part:
    """Make the part of a linear layer for these adapters."""
    weight = stored_weight(layer.base_layer).detach()
    pools = tuple(id(tensor) for adapter in adapters for tensor in adapter.pool.values())
    return Part(
        name,
        layer.base_layer,
        weight.t() if layer.transposed else weight,
        tuple(adapter.factors() for adapter in adapters),
        (layer.transposed, *pools),
        layer,
    )


def stack_parts(
    name: str, base: nn.Module, key: str, adapters: Iterable[Adapter], owner: nn.Module
) -> list[Part]:
    """Make the parts of a stacked weight, ``base.key``: one per expert."""
    factors = [adapter.factors() for adapter in adapters]
    return [
        Part(
            f"{name}[{i}]",
            base,
            weight,
            tuple(of_weight.of_expert(i) for of_weight in factors),
            (id(owner), key),
            owner,
            (key, i),
        )
        for i, weight in enumerate(expert_weight(base, key).detach())
    ]


def chunks_of(parts: Iterable[Part]) -> Iterator[Chunk]:
    """Split ``parts`` into chunks for one product: equal keys, at most CHUNK_BYTES of dW.

    Bytes are counted in the dtype in which weights are summed.
    """
    alike: dict[Hashable, Chunk] = {}
    for part in parts:
        base = (part.weight.dtype, part.weight.device)
        tensors = [t for factors in part.factors for t in factors if t is not None]
        adapters = [(t.shape, t.dtype, t.device) for t in tensors]
        alike.setdefault((*base, part.alike, *adapters), []).append(part)
    for chunk in alike.values():
        first = chunk[0].weight
        itemsize = ops.accumulation_dtype(first.dtype).itemsize
        step = max(1, CHUNK_BYTES // max(first.numel() * itemsize, 1))
        yield from (chunk[begin : begin + step] for begin in range(0, len(chunk), step))


@torch.no_grad()
def packs_of(chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pack a chunk into Ap (L, R, in) and Bp (L, R, out), R over all adapters of a part."""
    by_adapter = zip(*(part.factors for part in chunk), strict=True)
    packs = [_packs(factors, dtype) for factors in by_adapter]
    down, up = zip(*packs, strict=True)
    return torch.cat(down, 1), torch.cat(up, 1)


def _packs(factors: Sequence[Factors], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pack one adapter of each part."""
    first = factors[0]
    if any(of_part.A_pool is not first.A_pool for of_part in factors):
        # Each part reads other ranks of the pool, or the pool is on another device.
        downs, ups = zip(*(pack_layers([of_part], dtype, 1) for of_part in factors), strict=True)
        return torch.cat(downs), torch.cat(ups)
    return pack_layers(factors, dtype, 1)


def deltas_of(chunk: Chunk, dtype: torch.dtype | None = None) -> Tensor:
    """Compute dW (L, out, in) of a chunk, by default in the dtype of the sums."""
    wide = dtype or ops.accumulation_dtype(chunk[0].weight.dtype)
    return ops.delta_group(*packs_of(chunk, wide))


def check_finite(parts: Sequence[Part], weights: Sequence[Tensor], argument: str) -> None:
    """Raise ValueError, beginning with ``argument``, if a merged weight is not finite."""
    finite = torch.stack([weight.isfinite().all() for weight in weights]).tolist()
    for part, weight, good in zip(parts, weights, finite, strict=True):
        if not good:
            raise ValueError(
                f"{argument}: expected finite merged weights, but {part.name!r} would hold values "
                f"that are not finite in {weight.dtype}; nothing was merged."
            )
