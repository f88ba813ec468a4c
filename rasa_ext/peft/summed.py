"""Several adapters of one stacked weight as one: their changes add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rasa_ext.nn.adapter import Adapter
from rasa_ext.ops import Factors


class Sum:
    """A method whose factors are those of several adapters below each other."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters

    @property
    def dropout(self) -> float:
        """The rate of all of them, which see one input; ValueError where they have several."""
        rates = sorted({adapter.config.dropout for adapter in self._adapters})
        if len(rates) > 1:
            raise ValueError(
                "rasa_dropout: expected one rate of all active adapters of a stack of experts, "
                f"got {', '.join(map(str, rates))}; train one at a time, with "
                "model.set_adapter(name), or give them one rate."
            )
        return rates[0]

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype of the first one's parameters."""
        return self._adapters[0].config.adapter_dtype

    def own(self, place: Any) -> dict[str, Tensor]:
        """Raise NotImplementedError: a sum is of adapters that exist."""
        raise NotImplementedError("a sum of adapters makes no tensors.")

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], place: Any) -> Factors:
        """Give the factors whose dW is the sum of all."""
        return joined([adapter.factors() for adapter in self._adapters])


def summed(adapters: Sequence[Adapter]) -> Adapter:
    """Give one adapter that changes a stacked weight by what all of them together do."""
    if len(adapters) == 1:
        return adapters[0]
    own, pool = (
        {f"{i}.{f}": t for i, each in enumerate(adapters) for f, t in getattr(each, part).items()}
        for part in ("own", "pool")
    )
    return Adapter(Sum(adapters), own, pool, adapters[0].place)


def joined(parts: Sequence[Factors]) -> Factors:
    """Put factors of one stacked weight below each other, private and pooled ones apart.

    A (E, r-k, in), B (E, out, r-k) and d (E, R), and a pool (P, in) and (out, P) that all experts
    read. A pool of each expert, (E, P, in) and (E, out, P), is private as far as sums go.
    """
    A: list[Tensor] = []
    B: list[Tensor] = []
    d: list[Tensor] = []
    A_pools: list[Tensor] = []
    B_pools: list[Tensor] = []
    pool_ds: list[Tensor] = []
    for part in parts:
        own = part.A.shape[1]
        diagonal = part.A.new_ones((part.A.shape[0], part.rank)) if part.d is None else part.d
        A.append(part.A)
        B.append(part.B)
        d.append(diagonal[:, :own])
        if part.A_pool is None or part.B_pool is None:
            continue
        each = part.A_pool.dim() == 3
        (A if each else A_pools).append(part.A_pool)
        (B if each else B_pools).append(part.B_pool)
        (d if each else pool_ds).append(diagonal[:, own:])
    pooled = bool(A_pools)
    return Factors(
        torch.cat(A, 1),
        torch.cat(A_pools) if pooled else None,
        torch.cat(B, 2),
        torch.cat(B_pools, 1) if pooled else None,
        torch.cat([*d, *pool_ds], 1),
    )
