"""The commands, put together: a module a verb, and those of installed packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from rasa_ext import __version__
from rasa_ext.commands.demo import demo
from rasa_ext.commands.env import env
from rasa_ext.commands.evaluate import evaluate
from rasa_ext.commands.export_lora import export_lora
from rasa_ext.commands.finetune import finetune
from rasa_ext.commands.generate import generate
from rasa_ext.commands.import_lora import import_lora
from rasa_ext.commands.import_official import import_official
from rasa_ext.commands.inspection import inspect
from rasa_ext.commands.merge import merge
from rasa_ext.commands.push import push

app = typer.Typer(
    name="rasa-ext",
    help="Fine-tune language models with RaSA (Rank-Sharing Low-Rank Adaptation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_FILES = (merge, export_lora, import_lora, import_official, push, inspect)
for _command in (finetune, evaluate, generate, *_FILES, env, demo):
    app.command()(_command)
for _announced in entry_points(group="rasa_ext.commands"):  # of installed packages
    app.command(_announced.name)(_announced.load())


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print and exit."),
    ] = False,
) -> None:
    pass
