"""Projections that read one input, such as q, k and v, computed together.

Which layers may belong together is told by their parent and their names as a model is patched. The
first of them that meets an x computes all, and the others find their outputs waiting if they read
the very same x, unchanged. Those that turn out to read another one leave for good.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rasa_ext import ops
from rasa_ext.nn import functional
from rasa_ext.nn.shapes import count_tokens
from rasa_ext.ops import Factors


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Projection(NamedTuple):
    """One layer as a GEMM with an adapter."""

    weight: Tensor
    bias: Tensor | None
    sources: tuple[Tensor, ...]
    factors: Callable[[], Factors]
    dropout: float

    def stamp(self) -> list[int]:
        """Give what differs once a tensor was replaced or written to; all of them are alive."""
        base = (self.weight,) if self.bias is None else (self.weight, self.bias)
        tensors = (*self.sources, *base)
        return [*map(id, self.sources), *map(_version, tensors), *map(Tensor.data_ptr, base)]


class Projected(Protocol):
    """A layer that can be computed together with others."""

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """Give the layer as a projection in ``dtype``, or None where it is more than that."""


class _Round:
    """One x, and the outputs that wait for the layers which are still to read it."""

    def __init__(self, x: Tensor, dtype: torch.dtype, leader: Projected, stamp: list[int]) -> None:
        self.x, self.form = weakref.ref(x), self._form(x, dtype)
        self.leader, self.stamp = weakref.ref(leader), stamp
        self.waiting: dict[int, tuple[Tensor | None, list[int]]] = {}

    def is_of(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.x() is x and self.form == self._form(x, dtype)

    @staticmethod
    def _form(x: Tensor, dtype: torch.dtype) -> tuple[int, bool, bool, torch.dtype]:
        return x._version, x.requires_grad, torch.is_grad_enabled(), dtype

    def drop_in_backward(self, y: Tensor) -> None:
        """Let go of outputs in a backward through y, which frees what they share with it."""
        current = weakref.ref(self)

        def drop(grads: tuple[Tensor | None, ...]) -> None:
            its = current()
            if its is not None:
                its.waiting = {key: (None, stamp) for key, (_, stamp) in its.waiting.items()}

        if y.grad_fn is not None:
            y.grad_fn.register_prehook(drop)


class _Rounds(threading.local):
    """The round of each thread, whose forwards may read one x beside those of others."""

    current: _Round | None = None


class FusedProjections:
    """Shared by the layers of one parent that may read one input; holds none of them alive.

    For forwards with grad, where ``ops.fuse_projections`` says that they gain by it, and for those
    with dropout, whose mask they share.
    """

    def __init__(self, layers: Iterable[Projected]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._rounds = _Rounds()

    def output(
        self, layer: Projected, part: Projection, x: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Give the layer's output for x (..., in) in ``dtype``, or None: compute it alone.

        ``part`` is what ``layer.projection(dtype)`` would give.
        """
        if x.is_inference():  # without a version by which x would be known again
            return None
        current = self._rounds.current
        if current is not None:
            if current.is_of(x, dtype) and id(layer) in current.waiting:
                y, stamp = current.waiting.pop(id(layer))
                return y if part.stamp() == stamp else None
            if current.waiting:
                self._part(current, dtype)
        return self._compute(layer, part, x, dtype)

    def layers(self) -> list[Projected]:
        """Give the layers that still go together."""
        return [layer for layer in (each() for each in self._layers) if layer is not None]

    def _part(self, last: _Round, dtype: torch.dtype) -> None:
        """Let go for good of those that did not read the x of the round before.

        The leader, where none of the others did; else the others. Only once the parameters have
        been written to: a checkpoint that runs a forward again must save the same tensors.
        """
        leader = last.leader()
        part = None if leader is None else leader.projection(dtype)
        if part is None or part.stamp() == last.stamp:
            return
        layers = {id(each()): each for each in self._layers}
        others = set(layers) - {id(leader)}
        leaving = {id(leader)} if others <= set(last.waiting) else set(last.waiting)
        self._layers = [each for key, each in layers.items() if key not in leaving]
        last.waiting.clear()

    def _compute(
        self, leader: Projected, first: Projection, x: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Compute all outputs: give the leader's, and let those of the others wait."""
        layers = [layer for layer in (each() for each in self._layers) if layer is not leader]
        if not layers or len(layers) == len(self._layers) or not _fit(first, first, x):
            return None
        parts = [first]
        for each in layers:
            part = None if each is None else each.projection(dtype)
            if part is None or not _fit(part, first, x):
                return None
            parts.append(part)
        outputs = _adapted_projections(x if x.dtype == dtype else x.to(dtype), parts)
        # Only now: a checkpoint that stops in the middle of a recomputation leaves no round.
        current = _Round(x, dtype, leader, first.stamp())
        for each, part, y in zip(layers, parts[1:], outputs[1:], strict=True):
            current.waiting[id(each)] = y, part.stamp()
        current.drop_in_backward(outputs[0])
        self._rounds.current = current
        return outputs[0]

    def forget(self) -> None:
        """Let go of outputs that wait in this thread."""
        self._rounds.current = None

    def __getstate__(self) -> dict[str, Any]:
        """Give its layers themselves: a copy's are the copies."""
        return {"layers": [layer() for layer in self._layers if layer() is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layers = [weakref.ref(layer) for layer in state["layers"]]
        self._rounds = _Rounds()


def _adapted_projections(x: Tensor, parts: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Compute every part's output for x (..., in), in its dtype."""
    weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    factors = [part.factors() for part in parts]
    rank, tokens = max(each.rank for each in factors), count_tokens(x)
    multiple = ops.rank_multiple(x.device.type, x.dtype, rank, tokens)
    drop = functional.dropout(x, parts[0].dropout)
    return functional.adapted_projections(x, weights, biases, factors, multiple, *drop)


def _fit(part: Projection, first: Projection, x: Tensor) -> bool:
    """Tell whether a projection can be computed with the first of them, on x's device.

    Adapters of several dtypes, as where one was cast alone, are computed one by one.

    A pool that lies on another device than the layer's own tensors is brought to it.
    """
    if part.dropout != first.dropout or len(part.sources) != len(first.sources):
        return False
    mine, its = part.sources[0], first.sources[0]
    return part.weight.device == x.device == mine.device and mine.dtype == its.dtype
