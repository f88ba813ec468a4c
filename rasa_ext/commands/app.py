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
from rasa_ext.commands.options import OTHER_NAMES, SAME
from rasa_ext.commands.push import push
from rasa_ext.commands.trl import app as trl_app

_ELSEWHERE = {
    "train": "use finetune",
    "chat": "use generate",
    "help": "use --help",
    **dict.fromkeys(("ranks", "compress"), "`pip install ./research` adds it"),
}
"""What people type, and where to find it."""


class _Group(typer.core.TyperGroup):
    """Commands, and a pointer for what people look for by another name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names; end with a pointer if there is none."""
        if args and args[0] not in self.commands and args[0] in _ELSEWHERE:
            ctx.fail(f"No such command {args[0]!r}: {_ELSEWHERE[args[0]]}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="rasa-ext",
    cls=_Group,
    help="Fine-tune language models with RaSA (Rank-Sharing Low-Rank Adaptation). Packages add "
    "commands: `pip install ./research` adds ranks and others.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Command(typer.core.TyperCommand):
    """A command that takes TRL's name for an option, or suggests ours, and each once."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments; raise BadParameter with our name for an option of TRL or PEFT."""
        known, words = {parameter.name for parameter in self.params}, []
        for word in args:
            name, equals, value = word.partition("=")
            theirs = name.removeprefix("--").replace("-", "_")
            ours = OTHER_NAMES.get(theirs, "")
            if word.startswith("--") and ours in known:
                option = f"--{ours.replace('_', '-')}"
                if theirs not in SAME:
                    raise typer.BadParameter(f"{word}: did you mean {option}?")
                word = f"{option}{equals}{value}"
            words.append(word)
        parsed: Any = self.make_parser(ctx).parse_args(list(words))
        _, rest, order = parsed
        if rest:
            raise typer.BadParameter(
                f"unexpected {rest[0]!r}; separate the values of an option by commas, and quote "
                "texts with blanks."
            )
        for option in order:
            if order.count(option) > 1 and not option.multiple:
                raise typer.BadParameter("expected this option once.", param=option)
        return super().parse_args(ctx, words)


_FILES = (merge, export_lora, import_lora, import_official, push, inspect)
for _command in (finetune, evaluate, generate, *_FILES, env, demo):
    app.command(cls=_Command)(_command)
app.add_typer(trl_app, name="trl")
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
