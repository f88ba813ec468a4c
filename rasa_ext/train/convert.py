"""An adapter directory and its base model in, another form of the same adapter out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import rasa_ext
from rasa_ext.checkpoint.files import read_config
from rasa_ext.train.model_loading import load_model, load_tokenizer, save_model


def merge_adapter(adapter: Path, output: Path, *, base: str | None, dtype: str) -> float:
    """Write base + adapter as a standalone model with its tokenizer.

    Returns the largest change of any weight. Raises FileNotFoundError or ValueError where the
    adapter or the base cannot be read, or do not fit each other; nothing is written then.
    """
    check_differs(adapter, output)
    name, model = _load(adapter, base, dtype)
    change = max(delta.abs().max().item() for _, delta in rasa_ext.delta_weights(model))
    save_model(rasa_ext.merge_and_unload(model), load_tokenizer(name), output)
    return change


class Exported(NamedTuple):
    """A LoRA that was written, and the base that it is for."""

    base: str
    rank: int
    float32: bool
    """Tell whether the base is stored in float32."""


def export_adapter(
    adapter: Path, output: Path, *, base: str | None, pad_to: int | None, allow_dropped: bool
) -> Exported:
    """Write the adapter as a plain LoRA."""
    check_differs(adapter, output)
    name, model = _load(adapter, base, "auto")
    float32 = model.dtype == torch.float32
    rank = rasa_ext.export_lora(model, output, pad_to=pad_to, allow_dropped=allow_dropped)
    return Exported(name, rank, float32)


def import_checkpoint(checkpoint: Path, output: Path, *, base: str | None) -> None:
    """Write a checkpoint of the official RaSA code as an adapter of this package."""
    check_differs(checkpoint, output)
    model = load_model(base_of(checkpoint, base))
    rasa_ext.load_official(model, checkpoint)
    rasa_ext.save_adapter(model, output)


def base_of(adapter: Path, given: str | None) -> str:
    """The base model's name: as given, or as `adapter_config.json` says."""
    recorded = read_config(adapter).get("base_model_name_or_path")
    name = given or recorded
    if not name:
        raise ValueError(
            f"model: {adapter} does not say which base model it was trained on; pass --model."
        )
    return name


def _load(adapter: Path, base: str | None, dtype: str) -> tuple[str, Any]:
    name = base_of(adapter, base)
    return name, rasa_ext.load_adapter(load_model(name, dtype), adapter)


def check_differs(source: Path, output: Path) -> None:
    """Raise ValueError where the output would be written over what it is made from."""
    if source.resolve() == output.resolve():
        raise ValueError(f"output: expected another directory than the adapter's, got {output}.")
