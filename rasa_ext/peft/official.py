"""Checkpoints of the official RaSA code, on their way through PEFT's loading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.official import own_names
from rasa_ext.peft.layer import RasaPeftLinear

# A official key into which PEFT 0.20 has put the adapter's name.
_NAMED = re.compile(
    r"^(?P<head>.+\.rasa_(?:A|B|mixing|shared_A|shared_B))\.(?P<adapter>[^.]+)"
    r"\.(?P<tail>(?:[^.]+\.)?weight)$"
)


def from_official(
    tensors: Mapping[str, Tensor], model: nn.Module, adapter_name: str
) -> dict[str, Tensor]:
    """Tensors under the official names, under those that PEFT saves; others keep theirs."""
    owners = [
        f"{PREFIX}{name.removeprefix(PREFIX)}"
        for name, module in model.named_modules()
        if isinstance(module, RasaPeftLinear) and adapter_name in module.rasa_pool_A
    ]
    return own_names(tensors, owners, "the checkpoint")


def official_names_hook(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Hook before loading, for PEFT 0.20, which lets no method rename what it loads."""
    found = [match for key in state_dict if (match := _NAMED.match(key))]
    for adapter in {match["adapter"] for match in found}:
        named = [match for match in found if match["adapter"] == adapter]
        tensors = {f"{match['head']}.{match['tail']}": state_dict.pop(match[0]) for match in named}
        renamed = from_official(tensors, module.model, adapter)
        state_dict.update((f"{key}.{adapter}", tensor) for key, tensor in renamed.items())
