"""Packs made without grad, kept while no parameter has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Form = tuple[torch.dtype, torch.device]
"""The dtype and device of a pack."""
Made = tuple[Tensor, Tensor]
"""A pack: Ap and Bp."""
_Kept = tuple[Made, tuple[Any, Any] | None, Form, Sequence[Tensor], Sequence[int], object]
"""A pack, on a GPU the stream that made it and an event behind the kernel, and the key."""

_last_step = object()  # another one after every step of any optimizer of the process


def _stepped(*_: Any) -> None:
    global _last_step
    _last_step = object()


# Fused optimizers, torch's and those of bitsandbytes, write without raising a tensor's version.
register_optimizer_step_post_hook(_stepped)


class PackCache:
    """The last pack, keyed by the identity and version of what it was made from.

    A step of any optimizer makes it stale as well. While a CUDA graph is captured nothing is taken
    from here or put here: packing becomes part of the graph, whose replays then see new parameters.
    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        # Replaced as one, since threads that serve share it. Keeping the tensors alive keeps their
        # identities from being taken over by others.
        self._kept: _Kept | None = None

    def get(self, sources: Sequence[Tensor], form: Form, make: Callable[[], Made]) -> Made:
        """Return what was made of ``sources`` in ``form``, or else ``make()``, which is kept.

        Every forward of every layer asks this while decoding, where microseconds count: hence one
        loop over plain comparisons.
        """
        kept = self._kept
        if kept is not None:
            made, packed, its_form, its_sources, versions, step = kept
            if step is _last_step and its_form == form and len(its_sources) == len(sources):
                for source, its, version in zip(sources, its_sources, versions, strict=True):
                    if source is not its or source._version != version:
                        break
                else:
                    if not _is_capturing(form[1]):
                        if packed is not None:
                            _wait(made, *packed)
                        return made
        if _is_capturing(form[1]) or any(source.is_inference() for source in sources):
            return make()
        # Read before packing: what another thread writes meanwhile is then seen.
        versions, step = [source._version for source in sources], _last_step
        made, packed = make(), None
        if form[1].type == "cuda":
            stream = torch.cuda.current_stream(form[1])
            packed = stream, stream.record_event()
        self._kept = made, packed, form, tuple(sources), versions, step
        return made

    def drop(self) -> None:
        """Forget the pack."""
        self._kept = None

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        return type(self), ()


def _wait(made: Made, maker: Any, packed: Any) -> None:
    """Order this stream behind the kernel that packed, and reuse of the memory behind this stream.

    Another stream than the maker's could read the pack before it is written, and the memory could
    be taken for something else as soon as the pack is dropped over there.
    """
    stream = torch.cuda.current_stream(made[0].device)
    if stream != maker:
        stream.wait_event(packed)
        for tensor in made:
            tensor.record_stream(stream)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # The question is about the current device, which need not be the pack's.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
