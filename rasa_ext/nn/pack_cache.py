"""A cache of packs made without grad, valid while no parameter changes."""

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
"""A pack, the stream that made it and an event after the kernel (on a GPU), and the key."""

_last_step = object()  # replaced after every step of any optimizer in the process


def _stepped(*_: Any) -> None:
    global _last_step
    _last_step = object()


# Fused optimizers of torch and bitsandbytes write without raising a tensor's version.
register_optimizer_step_post_hook(_stepped)


class PackCache:
    """A cache of the last pack, keyed by the identity and version of the source tensors.

    A step of any optimizer also makes the pack stale. The cache is not used while a CUDA graph is
    captured: packing becomes part of the graph, so that replays see new parameters. Copies and
    pickles are empty.
    """

    def __init__(self) -> None:
        # Replaced in one assignment, since threads share it. Holding the tensors alive ensures
        # that no other tensor gets their identities.
        self._kept: _Kept | None = None

    def get(self, sources: Sequence[Tensor], form: Form, make: Callable[[], Made]) -> Made:
        """Return the cached pack of ``sources`` in ``form``, or call ``make()`` and cache the pack.

        While decoding, every forward of every layer calls this, and microseconds count: hence one
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
        # Read before packing, so that a write by another thread meanwhile makes the pack stale.
        versions, step = [source._version for source in sources], _last_step
        made, packed = make(), None
        if form[1].type == "cuda":
            stream = torch.cuda.current_stream(form[1])
            packed = stream, stream.record_event()
        self._kept = made, packed, form, tuple(sources), versions, step
        return made

    def drop(self) -> None:
        """Drop the pack."""
        self._kept = None

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        return type(self), ()


def _wait(made: Made, maker: Any, packed: Any) -> None:
    """Make this stream wait for the packing kernel, and reuse of the memory wait for this stream.

    Otherwise a stream other than the maker's could read the pack before it is written, and the
    memory could be reused as soon as the maker drops the pack.
    """
    stream = torch.cuda.current_stream(made[0].device)
    if stream != maker:
        stream.wait_event(packed)
        for tensor in made:
            tensor.record_stream(stream)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # This asks about the current device, which may not be the pack's.
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
