"""Packs made without grad, kept while no parameter has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Make = Callable[[torch.dtype, int], Sequence[Tensor]]


class PackCache:
    """The last pack, keyed by the parameters' identity, version, memory and device.

    A CUDA graph that is being captured over a cached pack reads its memory in every replay. Such a
    pack is never freed, and when the parameters have changed it is filled again in place: by the
    next forward without grad outside the graph, or by ``refresh``. Where nothing is cached yet,
    packing becomes part of the graph.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._tensors: Sequence[Tensor] = ()
        self._pack: Sequence[Tensor] = ()
        self._captured: dict[tuple, Sequence[Tensor]] = {}

    def get(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, multiple: int, make: Make
    ) -> Sequence[Tensor]:
        """``make(dtype, multiple)``, a pack of ``tensors``, unless it is here already."""
        device = tensors[0].device
        capturing = _is_capturing(device)
        form = (dtype, multiple, device)
        key = (form, *((id(t), t._version, t.data_ptr(), t.device) for t in tensors))
        if self._key != key:
            # Made under inference_mode, it could not be filled again outside.
            with torch.inference_mode(False):
                pack = make(dtype, multiple)
            if capturing:
                return pack
            if form in self._captured:
                pack = _fill(self._captured[form], pack)
            # Keeping the tensors alive keeps another one from taking over an id of the key.
            self._key, self._tensors, self._pack = key, tensors, pack
        if capturing:
            self._captured[form] = self._pack
        return self._pack

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has been captured over one of the packs."""
        return bool(self._captured)

    def drop(self) -> None:
        """Forget the pack; memory that captured graphs read stays."""
        if self._key is not None:
            self._key, self._tensors, self._pack = None, (), ()

    def refresh(self, make: Make) -> None:
        """Fill what captured graphs read with packs of the parameters as they are now."""
        self.drop()
        for (dtype, multiple, _), pack in self._captured.items():
            _fill(pack, make(dtype, multiple))

    def __reduce__(self) -> tuple:
        return type(self), ()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _fill(into: Sequence[Tensor], pack: Sequence[Tensor]) -> Sequence[Tensor]:
    for old, new in zip(into, pack, strict=True):
        old.copy_(new)
    return into
