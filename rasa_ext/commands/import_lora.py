"""``rasa-ext import-lora``: convert a LoRA to an adapter of this package."""

from __future__ import annotations

from pathlib import Path

from rasa_ext.commands.output import command, console
from rasa_ext.commands.parsing import Output, Overwrite, check_differs


@command
def import_lora(
    lora: Path,
    *,
    output: Output,
    k: int = 0,
    model: str | None = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a LoRA to a RaSA adapter that computes the same function.

    Args:
        lora: Directory of a LoRA in PEFT's format.
        k: Ranks that every layer gives to a pool, so that training goes on at a higher rank.
        model: Base model: hub id, directory or .gguf. [default: the one that the LoRA names]
    """
    from rasa_ext import Card
    from rasa_ext.checkpoint import convert_lora, read_lora
    from rasa_ext.commands.models import base_of, copy_tokenizer, load_skeleton

    with base_of(lora, model, "lora") as base_name:
        check_differs((lora, base_name), output, overwrite=overwrite)
        base = load_skeleton(base_name)
    read = read_lora(lora)
    name = f"the LoRA `{lora.resolve().name}` of rank {read.rank}"
    card = Card(sections={"Source": f"Computes the same function as {name}."})
    convert_lora(base, read, str(lora), k).save(base, output, card=card)
    copy_tokenizer(lora, output)
    console.print(
        f"Adapter of k = {k} and rank {read.rank}, for {len(read.factors)} layers in {output}.",
        markup=False,
    )
