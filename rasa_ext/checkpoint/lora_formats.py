"""The files that a LoRA can be written as."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.checkpoint.files import write_adapter
from rasa_ext.checkpoint.lora_gguf import check_gguf, write_gguf
from rasa_ext.checkpoint.lora_mlx import check_mlx, write_mlx

PEFT_FILES = "peft"
FORMATS = (PEFT_FILES, "gguf", "mlx")
_OTHERS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "gguf": (check_gguf, write_gguf),
    "mlx": (check_mlx, write_mlx),
}

Writer = Callable[
    [str | os.PathLike[str], Mapping[str, Any], Mapping[str, Tensor], str | None], None
]
"""Takes a directory, PEFT's settings, PEFT's tensors, and the text of a card, or none."""


def writer_of(form: str, root: nn.Module, names: list[str], saved: Mapping[str, Tensor]) -> Writer:
    """Give what writes an adapter's LoRA in a format.

    Raises TypeError, ValueError or ImportError, naming the argument, where it has no such form.
    """
    if not isinstance(form, str):
        raise TypeError(f"format: expected a string, got {form!r}.")
    if form not in FORMATS:
        raise ValueError(f"format: expected {', '.join(map(repr, FORMATS))}, got {form!r}.")
    if form == PEFT_FILES:
        return write_adapter
    check, write = _OTHERS[form]
    check(root, names, saved)
    return functools.partial(write, root=root)
