"""Projections that read one input, such as q, k and v, computed together.

Which layers may belong together is known by their parent and their names as a model is patched. The
first of them that meets an x computes all, and the others find their outputs waiting if they read
the very same x, unchanged. Those that turn out to read another one leave for good.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.nn import functional
from rasa_ext.ops import Factors

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names that one parent gives to projections of one input."""


class Projection(NamedTuple):
    """One layer as a GEMM with an adapter."""

    weight: Tensor
    bias: Tensor | None
    sources: tuple[Tensor, ...]
    factors: Callable[[], Factors]
    dropout: float

    def stamp(self) -> list[int]:
        """Differs where a tensor was replaced or written to; all of them are alive."""
        base = (self.weight,) if self.bias is None else (self.weight, self.bias)
        versions = [n for t in self.sources for n in (id(t), t._version)]
        return [*versions, *(n for t in base for n in (t.data_ptr(), t._version))]


class Projected(Protocol):
    """What is asked of a layer."""

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """The layer as a projection in ``dtype``, or None where it is more than that."""


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


class FusedProjections:
    """Shared by the layers of one parent that may read one input; holds none of them alive.

    For forwards with grad, where ``ops.fuse_projections`` says that they gain by it, and for those
    with dropout, whose mask they share.
    """

    def __init__(self, layers: Iterable[Projected]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._round: _Round | None = None

    def output(self, layer: Projected, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The layer's output for x (..., in) in ``dtype``, or None: compute it alone."""
        current = self._round
        if current is not None:
            if current.is_of(x, dtype) and id(layer) in current.waiting:
                y, stamp = current.waiting.pop(id(layer))
                part = layer.projection(dtype)
                return None if part is None or part.stamp() != stamp else y
            if current.waiting:
                self._part(current, dtype)
        return self._compute(layer, x, dtype)

    def layers(self) -> list[Projected]:
        """Those that still go together."""
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

    def _compute(self, leader: Projected, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The leader's output; those of the others wait."""
        layers = [layer() for layer in self._layers]
        if len(layers) < 2 or leader not in layers:
            return None
        layers.sort(key=lambda each: each is not leader)  # stable: the leader first
        parts = [None if each is None else each.projection(dtype) for each in layers]
        first = parts[0]
        if any(part is None or not _fit(part, first, x) for part in parts):
            return None
        inputs = x if x.dtype == dtype else x.to(dtype)
        factors = [part.factors() for part in parts]
        outputs = functional.adapted_projections(
            inputs,
            [part.weight for part in parts],
            [part.bias for part in parts],
            factors,
            ops.rank_multiple(x.device.type, dtype, max(each.rank for each in factors)),
            *functional.dropout(inputs, first.dropout),
        )
        # Only now: a checkpoint that stops in the middle of a recomputation leaves no round.
        self._round = _Round(x, dtype, leader, first.stamp())
        for each, part, y in zip(layers[1:], parts[1:], outputs[1:], strict=True):
            self._round.waiting[id(each)] = y, part.stamp()
        self._round.drop_in_backward(outputs[0])
        return outputs[0]

    def forget(self) -> None:
        """Let go of outputs that wait."""
        self._round = None

    def __getstate__(self) -> dict[str, Any]:
        """Its layers themselves: a copy's are the copies."""
        return {"layers": [layer() for layer in self._layers if layer() is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"])


def link_fused_projections(model: nn.Module, kind: type[nn.Module]) -> None:
    """Let the layers of ``kind`` in a model know which of them may read one input."""
    for parent in model.modules():
        for names in TOGETHER:
            layers = [parent._modules.get(name) for name in names]
            layers = [layer for layer in layers if isinstance(layer, kind)]
            if len({layer.in_features for layer in layers}) == 1 < len(layers):
                fused = FusedProjections(layers)
                for layer in layers:
                    layer.fused = fused


def _fit(part: Projection, first: Projection, x: Tensor) -> bool:
    """Whether a projection can be computed with the first of them, on x's device."""
    if part.dropout != first.dropout or len(part.sources) != len(first.sources):
        return False
    return all(tensor.device == x.device for tensor in (part.weight, *part.sources))
