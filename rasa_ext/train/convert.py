"""An adapter directory and its base model in, another form of the same adapter out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import rasa_ext
from rasa_ext import Card, Truncation
from rasa_ext.checkpoint import Lora, convert_lora, read_lora
from rasa_ext.checkpoint.card import write_card
from rasa_ext.checkpoint.writing import new_folder
from rasa_ext.patching.state import adapted_experts
from rasa_ext.train.card import local_name, merged_card
from rasa_ext.train.inspection import check_adapter
from rasa_ext.train.model_loading import (
    base_of,
    base_skeleton,
    load_model,
    load_tokenizer,
    naming_the_base,
    save_model,
)
from rasa_ext.train.options import check_differs


def merge_adapter(
    adapter: Path, output: Path, *, base: str | None, dtype: str, overwrite: bool = False
) -> float:
    """Write base + adapter as a standalone model, its tokenizer and a card: all or nothing.

    Returns the largest change of any weight. Raises FileNotFoundError or ValueError where the
    adapter or the base cannot be read, or do not fit each other, or where ``output`` holds files
    and ``overwrite`` was not asked for; `WriteError` where it cannot be written.
    """
    check_adapter(adapter)
    name = base_of(adapter, base)
    check_differs((adapter, name), output, overwrite=overwrite)
    with naming_the_base(adapter, base):
        model, tokenizer = load_model(name, dtype), load_tokenizer(name)
    rasa_ext.load_adapter(model, adapter)
    change = max(delta.abs().max().item() for _, delta in rasa_ext.delta_weights(model))
    told = merged_card(model, adapter)
    merged = rasa_ext.merge_and_unload(model)
    with new_folder(output, "the adapter and the base are whole") as folder:
        save_model(merged, tokenizer, folder)
        write_card(folder, told, output)
    return change


LARGE = 2**30
"""Bytes of a LoRA of experts above which it is only written if that was asked for: 1 GiB."""


class Exported(NamedTuple):
    """A LoRA that was written, and the base that it is for."""

    base: str
    rank: int
    float32: bool
    """Tell whether the base is stored in float32."""
    expert_layout: str | None
    """The layout of adapted experts, None where there are none."""
    truncation: Truncation | None
    """What a chosen rank leaves out; None where all was asked for."""


def export_adapter(
    adapter: Path,
    output: Path,
    *,
    base: str | None,
    pad_to: int | None,
    allow_dropped: bool,
    expert_layout: str | None = None,
    large: bool = False,
    announce: Callable[[int], None] = lambda _: None,
    rank: int | None = None,
    format: str = "peft",
    overwrite: bool = False,
) -> Exported:
    """Write the adapter as a plain LoRA; errors are those of `merge_adapter`.

    ``announce`` is called with the bytes that it takes, before any is written. ValueError where it
    has experts and takes more than `LARGE`, and ``large`` was not asked for.
    """
    check_adapter(adapter)
    name = base_of(adapter, base)
    check_differs((adapter, name), output, overwrite=overwrite)
    with naming_the_base(adapter, base):
        model = load_model(name, "auto")
    rasa_ext.load_adapter(model, adapter)
    float32 = model.dtype == torch.float32
    size = rasa_ext.export_size(model, pad_to, expert_layout=expert_layout, rank=rank)
    announce(size)
    adapted = bool(adapted_experts(model))
    if adapted and size > LARGE and not large:
        raise ValueError(
            f"yes: the LoRA would take {size / 2**30:.1f} GiB, since each expert has all ranks of "
            "its pool written out, and nothing was written; pass --yes to write it, use "
            "`rasa-ext merge` instead or, where the experts are pool-only (experts='shared' with "
            "k = rank), --expert-layout shared-outer for SGLang."
        )
    written = rasa_ext.export_lora(
        model,
        output,
        pad_to=pad_to,
        expert_layout=expert_layout,
        rank=rank,
        format=format,
        allow_dropped=allow_dropped,
        card=Card.read(adapter),
    )
    truncation = None if rank is None else rasa_ext.export_error(model, rank)
    layout = (expert_layout or "peft") if adapted else None
    return Exported(name, written, float32, layout, truncation)


def import_checkpoint(
    checkpoint: Path, output: Path, *, base: str | None, overwrite: bool = False
) -> None:
    """Write a checkpoint of the official RaSA code as an adapter of this package."""
    check_adapter(checkpoint, "checkpoint")
    name = base_of(checkpoint, base)
    check_differs((checkpoint, name), output, overwrite=overwrite)
    with naming_the_base(checkpoint, base):
        model = load_model(name)
    rasa_ext.load_official(model, checkpoint)
    told = f"A checkpoint of the official RaSA code, `{local_name(str(checkpoint))}`."
    rasa_ext.save_adapter(model, output, card=Card(sections={"Source": told}))


def import_lora_directory(
    lora: Path, output: Path, *, base: str | None, overwrite: bool = False
) -> Lora:
    """Write a LoRA as an adapter of this package, and give the LoRA; no weights are loaded."""
    check_differs((lora,), output, overwrite=overwrite)
    read = read_lora(lora)
    model = base_skeleton(lora, base)
    name = f"the LoRA `{local_name(str(lora))}` of rank {read.rank}"
    card = Card(sections={"Source": f"Computes the same function as {name}."})
    convert_lora(model, read, str(lora)).save(model, output, card=card)
    return read
