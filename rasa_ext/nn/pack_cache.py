"""Packs made without grad, kept while no parameter has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Form = tuple[torch.dtype, torch.device]
"""The dtype and device of a pack."""
Made = tuple[Tensor, Tensor]
"""A pack: Ap and Bp."""


class PackCache:
    """The last pack, keyed by the identity and version of what it was made from.

    While a CUDA graph is captured nothing is taken from here or put here: packing becomes part of
    the graph, whose replays then see new parameters. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._form: Form | None = None
        # Keeping the tensors alive keeps their identities from being taken over by others.
        self._sources: Sequence[Tensor] = ()
        self._versions: Sequence[int] = ()
        self._made: Made | None = None
        self._stream: Any = None  # of the forward that made it, on a GPU

    def get(self, sources: Sequence[Tensor], form: Form, make: Callable[[], Made]) -> Made:
        """Return what was made of ``sources`` in ``form``, or else ``make()``, which is kept.

        Every forward of every layer asks this while decoding, where microseconds count: hence one
        loop over plain comparisons.
        """
        kept = self._made
        if kept is not None and self._form == form and len(self._sources) == len(sources):
            known = zip(sources, self._sources, self._versions, strict=True)
            for source, its, version in known:
                if source is not its or source._version != version:
                    break
            else:
                if not _is_capturing(form[1]):
                    if form[1].type == "cuda":
                        self._keep_for_this_stream(kept, form[1])
                    return kept
        made = make()
        if not (_is_capturing(form[1]) or any(source.is_inference() for source in sources)):
            self._form, self._sources, self._made = form, tuple(sources), made
            self._versions = [source._version for source in sources]
            self._stream = torch.cuda.current_stream(form[1]) if form[1].type == "cuda" else None
        return made

    def _keep_for_this_stream(self, made: Made, device: torch.device) -> None:
        """Let the memory of a pack that another stream made wait for what this one does with it.

        Else it could be taken for something else as soon as the pack is dropped over there.
        """
        stream = torch.cuda.current_stream(device)
        if stream != self._stream:
            for tensor in made:
                tensor.record_stream(stream)

    def drop(self) -> None:
        """Forget the pack."""
        if self._form is not None:
            self._form, self._sources, self._versions, self._made = None, (), (), None

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        return type(self), ()


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # The question is about the current device, which need not be the pack's.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
