"""Several adapters of one stacked weight as a single adapter: their changes add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rasa_ext.nn.adapter import Adapter
from rasa_ext.ops import Factors


class Sum:
    """A method whose factors are the concatenated factors of several adapters."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters

    @property
    def dropout(self) -> float:
        """The adapters' common rate, since they read one input; ValueError if rates differ."""
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
        """Dtype of the first adapter's parameters."""
        return self._adapters[0].config.adapter_dtype

    def layer_tensors(self, spec: Any) -> dict[str, Tensor]:
        """Raise NotImplementedError: a sum is only made of existing adapters."""
        raise NotImplementedError("a sum of adapters makes no tensors.")

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: Any) -> Factors:
        """Return the factors whose dW is the sum of all."""
        return joined([adapter.factors() for adapter in self._adapters])


def summed(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter whose change of a stacked weight is the sum of all."""
    if len(adapters) == 1:
        return adapters[0]
    own, pool = (
        {f"{i}.{f}": t for i, each in enumerate(adapters) for f, t in getattr(each, part).items()}
        for part in ("own", "pool")
    )
    return Adapter(Sum(adapters), own, pool, adapters[0].spec)


def joined(parts: Sequence[Factors]) -> Factors:
    """Concatenate factors of one stacked weight, private and pooled ones apart.

    Shapes: A (E, r-k, in), B (E, out, r-k), d (E, R), and a pool (P, in) and (out, P) that all
    experts read. In a sum, pools per expert, (E, P, in) and (E, out, P), count as private.
    """
    own: list[tuple[Tensor, Tensor, Tensor]] = []
    pooled: list[tuple[Tensor, Tensor, Tensor]] = []
    for A, A_pool, B, B_pool, d in parts:
        ranks = A.shape[1]
        if d is None:
            d = A.new_ones((A.shape[0], ranks + (0 if A_pool is None else A_pool.shape[-2])))
        own.append((A, B, d[:, :ranks]))
        if A_pool is not None and B_pool is not None:
            (own if A_pool.dim() == 3 else pooled).append((A_pool, B_pool, d[:, ranks:]))
    down, up, diagonals = zip(*own, strict=True)
    A_pools, B_pools, last = zip(*pooled, strict=True) if pooled else ((), (), ())
    A_pool, B_pool = (torch.cat(A_pools), torch.cat(B_pools, 1)) if pooled else (None, None)
    d = torch.cat([*diagonals, *last], 1)
    return Factors(torch.cat(down, 1), A_pool, torch.cat(up, 2), B_pool, d)
