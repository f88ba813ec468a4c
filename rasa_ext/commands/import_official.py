"""``rasa-ext import-official``: convert a checkpoint of the official RaSA code."""

from __future__ import annotations

from pathlib import Path

from rasa_ext.commands.output import command, console, working
from rasa_ext.commands.parsing import Output, Overwrite, check_differs


@command
def import_official(
    checkpoint: Path, *, output: Output, model: str | None = None, overwrite: Overwrite = False
) -> None:
    """Convert a checkpoint of the official RaSA code to an adapter of this package.

    Args:
        checkpoint: Directory of the checkpoint.
        model: Base model: hub id, directory or .gguf. [default: the one that the checkpoint names]
    """
    import rasa_ext
    from rasa_ext.commands.models import base_of, copy_tokenizer, load_model

    source = f"A checkpoint of the official RaSA code, `{checkpoint.resolve().name}`."
    with base_of(checkpoint, model, "checkpoint") as name, working(f"Reading {checkpoint}"):
        check_differs((checkpoint, name), output, overwrite=overwrite)
        base = rasa_ext.load_official(load_model(name), checkpoint)
        rasa_ext.save_adapter(base, output, card=rasa_ext.Card(sections={"Source": source}))
        copy_tokenizer(checkpoint, output)
    console.print(f"Adapter in {output}.")
