"""Groups of layers that LoRA-Pro solves together: layers with one pool, or pairs of one shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext.methods import Factors
from rasa_ext.nn import AdaptedModule
from rasa_ext.patching import unwrap
from rasa_research.optim.least_norm import Ranks


@dataclass(frozen=True)
class TrainedLayer:
    """One adapted layer, and the index of the trained adapter."""

    name: str
    layer: AdaptedModule
    index: int

    def factors(self) -> Factors:
        """Return the current factors, each on the device where it is stored."""
        adapter = next(islice(self.layer.adapters(), self.index, None))
        return adapter.config.factors(adapter.own, adapter.pool, adapter.spec)


class Part(NamedTuple):
    """One factor, and the rows that it has in a group's ``down`` or ``up``."""

    tensor: Tensor
    start: int
    """The first row of the factor."""
    is_up: bool
    """Whether the ranks are columns, as in B."""

    @property
    def rows(self) -> slice:
        """The factor's rows."""
        return slice(self.start, self.start + self.tensor.shape[1 if self.is_up else 0])

    def of(self, rows: Tensor) -> Tensor:
        """Return the factor's rows of a whole group's ``rows``, in the factor's orientation."""
        return rows[self.rows].t() if self.is_up else rows[self.rows]


@dataclass(frozen=True)
class Problem:
    """One group at one step: ranks, gradients, and the parameters that they belong to."""

    layers: list[TrainedLayer]
    parts: list[list[Part]]
    """The trained parameters of each layer; the first layer also has the pool's."""
    ranks: Ranks
    gradient: Tensor
    """G, flat; 0 for rows that are not trained."""
    trained: Tensor
    """(2, ranks), for the rows of ``down`` and ``up``: 1 if trained, otherwise 0."""

    def parameters(self) -> list[Tensor]:
        """Return every trained parameter of the group."""
        return [part.tensor for parts in self.parts for part in parts]

    def write(self, step: Tensor) -> None:
        """Write a flat ``step`` into the gradients of the parameters."""
        sides = self.ranks.split(step)
        for part in (part for parts in self.parts for part in parts):
            assert part.tensor.grad is not None  # ``parts`` only has parameters with a gradient
            part.tensor.grad.copy_(part.of(sides[part.is_up]))


@dataclass(frozen=True)
class Group:
    """Layers that are solved together: all layers that train one pool, or pairs of one shape."""

    layers: tuple[TrainedLayer, ...]
    pooled: bool

    @torch.no_grad()
    def problem(self, optimized: Collection[int]) -> Problem | None:
        """Return the group's problem, or None if no parameter has a gradient.

        ``optimized`` has the ids of the optimizer's parameters. Parameters without a gradient are
        fixed. Without a pool, layers without any gradient are left out.
        """

        def counts(part: Part) -> bool:
            return id(part.tensor) in optimized and part.tensor.grad is not None

        found = [(layer, layer.factors()) for layer in self.layers]
        rank = max(len(factors.A) for _, factors in found)
        if not self.pooled:
            found = [each for each in found if any(map(counts, _own(each[1], 0)))]
        every = [_own(factors, number * rank) for number, (_, factors) in enumerate(found)]
        if self.pooled:
            every[0] += _pool(found[0][1], len(found) * rank)
        trained = [[part for part in parts if counts(part)] for parts in every]
        if not any(trained):
            return None
        own, pool = _diagonals([factors for _, factors in found], rank, self.pooled)
        height = own.numel() + pool.shape[1]
        A, _, B, _, _ = found[0][1]
        down, up, of_down, of_up = (own.new_zeros(height, n) for n in (A.shape[1], len(B)) * 2)
        flags = torch.zeros(2, height)
        for parts, mine in zip(every, trained, strict=True):
            for part in parts:
                part.of(up if part.is_up else down).copy_(part.tensor)
            for part in mine:
                assert part.tensor.grad is not None
                part.of(of_up if part.is_up else of_down).copy_(part.tensor.grad)
                flags[int(part.is_up), part.rows] = 1
        return Problem(
            [layer for layer, _ in found],
            trained,
            Ranks(down, up, own, pool),
            torch.cat((of_down.flatten(), of_up.flatten())),
            flags.to(own),
        )


def _own(factors: Factors, start: int) -> list[Part]:
    return [Part(factors.A, start, False), Part(factors.B, start, True)]


def _pool(factors: Factors, start: int) -> list[Part]:
    assert factors.A_pool is not None
    assert factors.B_pool is not None
    return [Part(factors.A_pool, start, False), Part(factors.B_pool, start, True)]


def _diagonals(factors: Sequence[Factors], rank: int, pooled: bool) -> tuple[Tensor, Tensor]:
    """Return the diagonals of private ranks (L, r), padded with 0 to r, and of the pool (L, K).

    They are on the device of the first layer's A, in A's dtype or float32, whichever is wider.
    """
    A, A_pool, *_ = factors[0]
    size = len(A_pool) if pooled and A_pool is not None else 0
    dtype = torch.promote_types(A.dtype, torch.float32)
    own = torch.zeros(len(factors), rank, dtype=dtype, device=A.device)
    pool = own.new_zeros(len(factors), size)
    for number, each in enumerate(factors):
        mine = len(each.A)
        d = own.new_ones(mine + size) if each.d is None else each.d
        own[number, :mine].copy_(d[:mine])
        pool[number].copy_(d[mine : mine + size])
    return own, pool


def find_groups(model: nn.Module) -> list[Group]:
    """Sort the layers of a model that train an adapter into groups.

    Raises:
        ValueError: no layer trains an adapter, a layer trains two at once, an adapter's factors are
            computed from other trained tensors, or experts are adapted.
        RuntimeError: an adapter is sharded over processes.
    """
    found: dict[tuple[bool, object], list[TrainedLayer]] = {}
    for name, layer in unwrap(model).named_modules():
        if not isinstance(layer, AdaptedModule):
            continue
        if any(adapter.spec.experts for adapter in layer.adapters()):
            raise ValueError(
                f"model: expected adapters of linear layers, but {name!r} has adapted experts, "
                "which this optimizer does not support; patch the model with experts=None."
            )
        every = [TrainedLayer(name, layer, index) for index, _ in enumerate(layer.adapters())]
        trained = [each for each in every if _trains(each)]
        if len(trained) > 1:
            raise ValueError(
                f"model: expected one trained adapter per layer, but {name!r} trains "
                f"{len(trained)} at once, and their sum is not one pair of factors."
            )
        for each in trained:
            factors = each.factors()
            pool = [
                f for f in (factors.A_pool, factors.B_pool) if f is not None and f.requires_grad
            ]
            shape = (factors.A.shape, factors.B.shape, factors.A.dtype, factors.A.device)
            key = tuple(map(id, pool)) or shape
            found.setdefault((bool(pool), key), []).append(each)
    if not found:
        raise ValueError(
            "model: expected a model with trained adapters of rasa_ext (from patch_model, "
            f"load_adapter or rasa_ext.peft), got a {type(model).__name__} without; convert a LoRA "
            "of PEFT with rasa_ext.import_lora."
        )
    return [Group(tuple(layers), pooled) for (pooled, _), layers in found.items()]


def _trains(layer: TrainedLayer) -> bool:
    """Return whether a factor of the adapter is trained; raise if it is computed from others."""
    adapter = next(islice(layer.layer.adapters(), layer.index, None))
    if not any(source.requires_grad for source in adapter.sources()):
        return False
    adapter.factors()  # raises if the adapter is sharded
    with torch.enable_grad():
        factors = layer.factors()[:4]
    trained = [each for each in factors if each is not None and each.requires_grad]
    if not all(each.is_leaf for each in trained):
        raise ValueError(
            "model: expected adapters with trained factors, but the factors of "
            f"{layer.name!r} are computed from trained tensors by "
            f"{type(adapter.config).__name__}; train it with another optimizer."
        )
    return bool(trained)
