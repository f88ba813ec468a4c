"""Layers that read the same input, such as q, k and v, computed together.

No model code is edited for it. The adapted layers of one parent share a ``Siblings``, which
watches who reads which tensor. Once it has seen several of them read one x, the first of these to
meet the next x computes them all, and the others find their outputs waiting. Whatever is
unexpected (another x, an x or a parameter that was changed in between, another mode) sends a layer
down its own path, with the same result up to rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rasa_ext import functional, ops
from rasa_ext.pack_cache import Make, PackCache

if TYPE_CHECKING:
    from rasa_ext.modules import AdaptedLinear

ENABLED: bool | None = None
"""Whether siblings are computed together: True or False, or None for ``ops.share_siblings``."""


class Part(NamedTuple):
    """What one layer brings: a dense base and an adapter, both on the input's device."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes where a tensor was replaced or written to."""
        tensors = (self.weight, self.bias, *self.adapter)
        return tuple((id(t), t._version) for t in tensors if t is not None)


class _Round:
    """One x, the layers that have read it, and the outputs that wait for others."""

    def __init__(self, x: Tensor, dtype: torch.dtype, layer: AdaptedLinear) -> None:
        self.x = weakref.ref(x)
        self.state = _state(x, dtype)
        self.versions = layer.versions()
        self.readers: list[weakref.ref] = []
        self.outputs: dict[weakref.ref, tuple[Tensor, tuple]] = {}

    def is_of(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.x() is x and self.state == _state(x, dtype)


class _Mode:
    """What was learned, apart for forwards with and without grad.

    With grad, ``members`` changes only after the parameters have: a checkpoint that runs a forward
    again must save the same tensors.
    """

    def __init__(self, with_grad: bool) -> None:
        self.with_grad = with_grad
        self.members: tuple[weakref.ref, ...] = ()
        self.pending: tuple[weakref.ref, ...] | None = None
        self.since: tuple = ()
        self.round: _Round | None = None

    def finish(self) -> None:
        """Learn from the round that is over."""
        if self.round is None:
            return
        readers, versions = tuple(self.round.readers), self.round.versions
        self.round = None
        if readers == self.members:
            self.pending = None
        elif readers[0] in self.members[:1] or len(readers) > 1:
            together = readers if len(readers) > 1 else ()
            if together != self.pending:
                self.pending, self.since = together, (readers[0], versions)

    def advance(self) -> bool:
        """Take up what was learned, if it may be; whether the members changed."""
        if self.pending is None:
            return False
        if self.with_grad:
            reader, versions = self.since
            layer = reader()
            if layer is not None and layer.versions() == versions:
                return False
        self.members, self.pending = self.pending, None
        return True


class Siblings:
    """Shared by the adapted layers of one parent that read inputs of one width.

    It holds no layer alive. Copies and pickles have learned nothing yet.
    """

    def __init__(self) -> None:
        self._modes = (_Mode(False), _Mode(True))
        self._cache = PackCache()

    def output(
        self, layer: AdaptedLinear, part: Part, x: Tensor, dtype: torch.dtype, with_grad: bool
    ) -> Tensor | None:
        """The layer's output for x (..., in) computed in ``dtype``, or None: compute it alone."""
        mode, me = self._modes[with_grad], weakref.ref(layer)
        current = mode.round
        if current is not None and me not in current.readers and current.is_of(x, dtype):
            current.readers.append(me)
            y, stamp = current.outputs.pop(me, (None, None))
            return y if stamp == part.stamp() else None
        mode.finish()
        if with_grad:
            mode.advance()
        elif not self._cache.captured and mode.advance():
            self._cache.drop()
        current = _Round(x, dtype, layer)
        y = None
        if mode.members and mode.members[0] == me:
            y = self._compute(mode, current, x, dtype)
        current.readers.append(me)
        mode.round = current  # only now, so that a checkpoint that stops in the middle is no round
        return y

    def _compute(
        self, mode: _Mode, current: _Round, x: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """The first member's output; those of the others wait."""
        layers = [member() for member in mode.members]
        parts = [
            None if each is None or each.dropout_now() > 0 else each.part(dtype) for each in layers
        ]
        if not all(
            part is not None and each.is_on(x.device)
            for part, each in zip(parts, layers, strict=True)
        ):
            return None
        ranks = [part.adapter[-1].shape[0] for part in parts]
        multiple = ops.rank_multiple(x.device.type, dtype, max(ranks))
        weights = [
            part.weight.t() if each.transposed else part.weight
            for each, part in zip(layers, parts, strict=True)
        ]
        biases, adapters = [part.bias for part in parts], [part.adapter for part in parts]
        inputs = x if x.dtype == dtype else x.to(dtype)
        if mode.with_grad:
            outputs: Sequence[Tensor] = functional.rasa_siblings(
                inputs, weights, biases, adapters, multiple
            )
        else:
            with torch.no_grad():
                outputs = self._without_grad(inputs, weights, biases, adapters, multiple)
        for member, part, y in zip(mode.members[1:], parts[1:], outputs[1:], strict=True):
            current.outputs[member] = (y, part.stamp())
        return outputs[0]

    def _without_grad(self, x, weights, biases, adapters, multiple) -> list[Tensor]:
        tensors = [t for adapter in adapters for t in adapter if t is not None]
        Ap, *Bt = self._cache.get(tensors, x.dtype, multiple, _packing(adapters))
        rows, biases = functional.rows(x), functional.given(biases)
        outputs, _ = ops.siblings_linear(rows, weights, biases, Ap, Bt)
        return [functional.shaped_like(y, x) for y in outputs]

    def layers(self) -> list[AdaptedLinear]:
        """Those that a forward with grad computes together."""
        found = [member() for member in self._modes[True].members]
        return [layer for layer in found if layer is not None]

    def drop_pack(self) -> None:
        """Forget the cached pack of all."""
        self._cache.drop()

    def forget(self) -> None:
        """Let go of outputs that wait, and of the cached pack."""
        for mode in self._modes:
            mode.round = None
        self._cache.drop()

    def repack(self) -> None:
        """Forget the cached pack, and fill again what captured CUDA graphs read of it."""
        layers = [member() for member in self._modes[False].members]
        if self._cache.captured and all(each is not None for each in layers):
            self._cache.refresh(_packing([each.adapter() for each in layers]))
        else:
            self._cache.drop()

    def __reduce__(self) -> tuple:
        return type(self), ()


def _packing(adapters: Sequence[tuple]) -> Make:
    """What packs the adapters of siblings: Ap, and every Bt with its diagonal."""
    A, A_pool, B, B_pool, d = zip(*adapters, strict=True)
    pools = functional.given(A_pool), functional.given(B_pool)

    def make(dtype: torch.dtype, multiple: int) -> Sequence[Tensor]:
        Ap, Bt = ops.pack_siblings(A, pools[0], B, pools[1], d, dtype, multiple)
        return Ap, *Bt

    return make


def wanted(x: Tensor) -> bool:
    """Whether a layer that reads x should ask its siblings at all."""
    if torch.compiler.is_compiling() or x.is_inference():
        return False
    return ops.share_siblings(x.device.type) if ENABLED is None else ENABLED


def _state(x: Tensor, dtype: torch.dtype) -> tuple:
    return x._version, x.requires_grad, dtype
