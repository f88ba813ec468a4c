"""Checkpoints of the official RaSA code, on their way through PEFT's loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.official import own_names


def from_official(tensors: Mapping[str, Tensor], owners: Iterable[str]) -> dict[str, Tensor]:
    """Give tensors under official names those that PEFT saves; others keep theirs.

    ``owners`` are the names of the layers that own a pool of the adapter.
    """
    prefixed = [f"{PREFIX}{name.removeprefix(PREFIX)}" for name in owners]
    return own_names(tensors, prefixed, "the checkpoint")
