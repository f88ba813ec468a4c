"""The application: one command per module, and the commands of installed packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
import typer.core

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
from rasa_ext.commands.options import OTHER_NAMES
from rasa_ext.commands.push import push

app = typer.Typer(
    name="rasa-ext",
    help="Fine-tune language models with RaSA (Rank-Sharing Low-Rank Adaptation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Command(typer.core.TyperCommand):
    """A command that suggests our name for an option of another program."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments; raise BadParameter with our name for an option of TRL or PEFT."""
        known = {parameter.name for parameter in self.params}
        for word in args:
            ours = OTHER_NAMES.get(word.partition("=")[0].removeprefix("--").replace("-", "_"))
            if word.startswith("--") and ours in known:
                raise typer.BadParameter(f"{word}: did you mean --{ours.replace('_', '-')}?")
        return super().parse_args(ctx, args)


_FILES = (merge, export_lora, import_lora, import_official, push, inspect)
for _command in (finetune, evaluate, generate, *_FILES, env, demo):
    app.command(cls=_Command)(_command)
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
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass
