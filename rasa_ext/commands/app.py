"""The application: one command per module, and the commands of installed packages."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
import typer.core

from rasa_ext import __version__
from rasa_ext.commands.demo import demo
from rasa_ext.commands.env import env
from rasa_ext.commands.evaluate import evaluate
from rasa_ext.commands.export_lora import export_lora
from rasa_ext.commands.generate import generate
from rasa_ext.commands.import_lora import import_lora
from rasa_ext.commands.import_official import import_official
from rasa_ext.commands.inspection import inspect
from rasa_ext.commands.merge import merge
from rasa_ext.commands.options import SHORT, TASKS, make_parser, parse, short_help
from rasa_ext.commands.output import command, console, working
from rasa_ext.commands.push import push

_ELSEWHERE = {
    "train": "use sft",
    "trl": "use sft, dpo, kto, reward, grpo or rloo",
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


_NAMES = {name: short[0] for field, short in SHORT.items() for name in (field, *short)}


class _Command(typer.core.TyperCommand):
    """A command that also takes the names of TRL and PEFT for its options, and each once."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments, with our name in the place of an option of TRL or PEFT."""
        known, words = {parameter.name for parameter in self.params}, []
        for word in args:
            name, equals, value = word.partition("=")
            theirs = name.removeprefix("--").replace("-", "_")
            ours = _NAMES.get(theirs, "")
            if word.startswith("--") and ours in known and theirs not in known:
                word = f"--{ours.replace('_', '-')}{equals}{value}"
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


def _add(task: str) -> None:
    """Add a training task, whose options its own parser reads."""
    passed = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @command
    def train(context: typer.Context) -> None:
        words = context.args
        if {"-h", "--help"} & {*words} or not words:
            typer.echo(short_help(task))
        elif "--help-all" in words:
            typer.echo(make_parser(task).format_help())
        else:
            with working("Loading PyTorch, transformers and TRL"):
                options = parse(task, words)
                from rasa_ext.commands.training import launch, run
            if options.launcher and "ACCELERATE_MIXED_PRECISION" not in os.environ:
                launch(options, words)
            else:
                run(options, console)

    for name in (task, "finetune") if task == "sft" else (task,):
        hidden = name != task
        app.command(name, context_settings=passed, help=TASKS[task].about, hidden=hidden)(train)


_FILES = (merge, export_lora, import_lora, import_official, push, inspect)
for _task in TASKS:
    _add(_task)
for _command in (evaluate, generate, *_FILES, env, demo):
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
