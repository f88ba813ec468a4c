"""``rasa-ext push``: an adapter's directory to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rasa_ext.commands.output import command, console


@command
def push(
    directory: Annotated[
        Path,
        typer.Argument(help="Directory of an adapter, or of a LoRA.", show_default=False),
    ],
    repository: Annotated[
        str, typer.Argument(help="Where to: owner/name; made if missing.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="The base's id on the Hub, where the adapter names a local folder.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that is missing a private one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to. [default: main]", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Message of the commit.", show_default=False)
    ] = None,
) -> None:
    """Push an adapter or an exported LoRA, with its card, to the Hugging Face Hub."""
    from rasa_ext import push_to_hub

    address = push_to_hub(
        directory,
        repository,
        base_model=model,
        private=private or None,
        revision=revision,
        commit_message=message,
    )
    console.print(address, markup=False)
