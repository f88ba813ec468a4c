"""Packs made without grad, kept while no parameter has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Make = Callable[[torch.dtype, int], Sequence[Tensor]]
Form = tuple[torch.dtype, int, torch.device]


class PackCache:
    """The last pack, keyed by the parameters' identity, version and memory.

    A CUDA graph that is being captured over a cached pack reads its memory in every replay. Such a
    pack is never freed, and when the parameters have changed it is filled again in place: by the
    next forward without grad outside the graph, or by ``refresh``. Where nothing is cached yet,
    packing becomes part of the graph.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._form: Form | None = None
        # (tensor, version, address) of each. Keeping the tensors alive keeps their addresses from
        # being taken over by others.
        self._stamps: Sequence[tuple[Tensor, int, int] | None] = ()
        self._pack: Sequence[Tensor] = ()
        self._captured: dict[Form, Sequence[Tensor]] = {}

    def find(
        self, tensors: Sequence[Tensor | None], dtype: torch.dtype, multiple: int
    ) -> Sequence[Tensor] | None:
        """The pack of ``tensors`` where it is here and current, else None.

        Every forward of every layer asks this while decoding, where microseconds count: hence one
        loop over plain comparisons.
        """
        form = (dtype, multiple, tensors[0].device)
        if self._form != form or len(self._stamps) != len(tensors):
            return None
        for tensor, stamp in zip(tensors, self._stamps, strict=True):
            if stamp is None:
                if tensor is not None:
                    return None
                continue
            known, version, address = stamp
            if tensor is not known or tensor._version != version or tensor.data_ptr() != address:
                return None
        if _is_capturing(form[2]):
            self._captured[form] = self._pack
        return self._pack

    def get(
        self, tensors: Sequence[Tensor | None], dtype: torch.dtype, multiple: int, make: Make
    ) -> Sequence[Tensor]:
        """``make(dtype, multiple)``, a pack of ``tensors``, unless it is here already.

        The first of ``tensors`` is not None; the others may be.
        """
        pack = self.find(tensors, dtype, multiple)
        if pack is None:
            device = tensors[0].device
            form = (dtype, multiple, device)
            # Made under inference_mode, it could not be filled again outside.
            with torch.inference_mode(False):
                pack = make(dtype, multiple)
            if _is_capturing(device):
                return pack
            if form in self._captured:
                pack = _fill(self._captured[form], pack)
            self._form, self._pack = form, pack
            self._stamps = [t if t is None else (t, t._version, t.data_ptr()) for t in tensors]
        return pack

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has been captured over one of the packs."""
        return bool(self._captured)

    def drop(self) -> None:
        """Forget the pack; memory that captured graphs read stays."""
        if self._form is not None:
            self._form, self._stamps, self._pack = None, (), ()

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
