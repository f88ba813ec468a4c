"""Checkpoints of the official RaSA code, on their way through PEFT's loading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.official import own_names

# An official key into which PEFT 0.20 has put the adapter's name.
_NAMED = re.compile(
    r"^(?P<head>.+\.rasa_(?:A|B|mixing|shared_A|shared_B))\.(?P<adapter>[^.]+)"
    r"\.(?P<tail>(?:[^.]+\.)?weight)$"
)


def from_official(tensors: Mapping[str, Tensor], owners: Iterable[str]) -> dict[str, Tensor]:
    """Give tensors under official names those that PEFT saves; others keep theirs.

    ``owners`` are the names of the layers that own a pool of the adapter.
    """
    prefixed = [f"{PREFIX}{name.removeprefix(PREFIX)}" for name in owners]
    return own_names(tensors, prefixed, "the checkpoint")


def rename_official(state_dict: dict[str, Any], owners: Callable[[str], Iterable[str]]) -> None:
    """Rename in place what is about to be loaded, for PEFT 0.20, which lets no method do so.

    ``owners(adapter)`` are the names of the layers that own a pool of that adapter.
    """
    found = [match for key in state_dict if (match := _NAMED.match(key))]
    for adapter in {match["adapter"] for match in found}:
        named = [match for match in found if match["adapter"] == adapter]
        tensors = {f"{match['head']}.{match['tail']}": state_dict.pop(match[0]) for match in named}
        renamed = from_official(tensors, owners(adapter))
        state_dict.update((f"{key}.{adapter}", tensor) for key, tensor in renamed.items())
