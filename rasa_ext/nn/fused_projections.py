"""Projections that read one input, such as q, k and v, computed together.

Patching groups layers by parent and name. The first layer of a group that gets an x computes all
outputs; the others return the stored outputs if they get this x, unchanged. A layer that gets
another x is not fused again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rasa_ext.nn import functional
from rasa_ext.nn.adapter import Adapter


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Projection(NamedTuple):
    """One layer as a GEMM with an adapter."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter
    dropout: float

    def stamp(self) -> list[int]:
        """Return a list that changes once a tensor is replaced or written to."""
        base = (self.weight,) if self.bias is None else (self.weight, self.bias)
        sources = self.adapter.sources()
        tensors = (*sources, *base)
        return [*map(id, sources), *map(_version, tensors), *map(Tensor.data_ptr, base)]


class Projected(Protocol):
    """A layer that can be fused with others."""

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """Return the layer as a projection in ``dtype``, or None if it is more than that."""


class _SharedInput:
    """One x, and the outputs of layers that have not read x yet."""

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
        """Drop the outputs in a backward through y, to free the memory that they share with y."""
        current = weakref.ref(self)

        def drop(grads: tuple[Tensor | None, ...]) -> None:
            shared = current()
            if shared is not None:
                shared.waiting = {key: (None, stamp) for key, (_, stamp) in shared.waiting.items()}

        if y.grad_fn is not None:
            y.grad_fn.register_prehook(drop)


class _PerThread(threading.local):
    """The input of a thread: threads may run forwards on one x at once."""

    current: _SharedInput | None = None


class FusedProjections:
    """A group of layers of one parent that may read one input, held by weak references.

    Used in forwards with grad if ``ops.fuse_projections`` expects a gain, and in forwards with
    dropout, in which the layers share a mask.
    """

    def __init__(self, layers: Iterable[Projected]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._inputs = _PerThread()

    def output(
        self, layer: Projected, part: Projection, x: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Return the layer's output for x (..., in) in ``dtype``, or None to compute it alone.

        ``part`` equals ``layer.projection(dtype)``.
        """
        if x.is_inference():  # such an x has no version, so a change would not be noticed
            return None
        current = self._inputs.current
        if current is not None:
            if current.is_of(x, dtype) and id(layer) in current.waiting:
                y, stamp = current.waiting.pop(id(layer))
                return y if part.stamp() == stamp else None
            if current.waiting:
                self._drop_other_readers(current, dtype)
        return self._compute(layer, part, x, dtype)

    def _drop_other_readers(self, last: _SharedInput, dtype: torch.dtype) -> None:
        """Stop fusing layers whose inputs differ.

        If no other layer read the leader's x, the leader leaves the group; else those that did not
        read it leave. This happens only after the parameters changed, since a checkpoint must
        recompute in the same way.
        """
        leader = last.leader()
        part = None if leader is None else leader.projection(dtype)
        if part is None or part.stamp() == last.stamp:
            return
        layers = {id(weak()): weak for weak in self._layers}
        others = set(layers) - {id(leader)}
        leaving = {id(leader)} if others <= set(last.waiting) else set(last.waiting)
        self._layers = [weak for key, weak in layers.items() if key not in leaving]
        last.waiting.clear()

    def _compute(
        self, leader: Projected, first: Projection, x: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Compute all outputs: return the leader's, and store the others."""
        layers = [layer for weak in self._layers if (layer := weak()) is not leader]
        if not layers or len(layers) == len(self._layers) or not _fit(first, first, x):
            return None
        parts = [first]
        for layer in layers:
            part = None if layer is None else layer.projection(dtype)
            if part is None or not _fit(part, first, x):
                return None
            parts.append(part)
        outputs = _adapted_projections(x if x.dtype == dtype else x.to(dtype), parts)
        # Only now, so that a checkpoint that stops a recomputation midway stores nothing.
        current = _SharedInput(x, dtype, leader, first.stamp())
        for layer, part, y in zip(layers, parts[1:], outputs[1:], strict=True):
            current.waiting[id(layer)] = y, part.stamp()
        current.drop_in_backward(outputs[0])
        self._inputs.current = current
        return outputs[0]

    def forget(self) -> None:
        """Drop the stored outputs of this thread."""
        self._inputs.current = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the layers as strong references, so that a copy refers to the copied layers."""
        return {"layers": [layer() for layer in self._layers if layer() is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layers = [weakref.ref(layer) for layer in state["layers"]]
        self._inputs = _PerThread()


def _adapted_projections(x: Tensor, parts: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Compute every part's output for x (..., in), in x's dtype."""
    weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    packs = [part.adapter.pack(x.dtype) for part in parts]
    dropped = functional.dropout(x, parts[0].dropout)
    return functional.adapted_projections(x, weights, biases, packs, dropped)


def _fit(part: Projection, first: Projection, x: Tensor) -> bool:
    """Return whether a projection can be fused with the first one, on x's device.

    Adapters of different dtypes are not fused. A pool on another device than the layer's private
    tensors is moved to their device.
    """
    source, first_source = part.adapter.sources()[0], first.adapter.sources()[0]
    same = part.dropout == first.dropout and source.dtype == first_source.dtype
    return same and part.weight.device == x.device == source.device
