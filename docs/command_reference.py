"""The reference of the command ``rasa-ext``, made from the options that it declares."""

from __future__ import annotations

import html
import inspect
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "rasa_ext"


def load() -> Any:
    """The command, without what ``import rasa_ext`` brings: its modules import torch as they run.

    Where the package is imported already, it is used as it is.
    """
    if "rasa_ext" not in sys.modules:
        sys.modules["rasa_ext"] = _StandIn("rasa_ext")
    import typer

    from rasa_ext.commands.app import app

    return typer.main.get_command(app)


class _StandIn(types.ModuleType):
    """The package with its submodules, and anything at all for its public names."""

    __path__ = [str(PACKAGE)]  # noqa: RUF012
    __version__ = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return object


def markdown() -> str:
    """A table of the commands, and each with its help text, its arguments and its options."""
    group = load()
    context = group.context_class(group, info_name="rasa-ext")
    rows, parts = ["| command | |", "| --- | --- |"], []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.context_class(command, info_name=name, parent=context)
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        text = inspect.cleandoc(command.help)
        rows.append(f"| [`rasa-ext {name}`](#{name}) | {text.splitlines()[0]} |")
        parts += [f"## {name}", text, f"```text\n{usage}\n```"]
        records = [parameter.get_help_record(inner) for parameter in command.params]
        parts += [entry(*record) for record in records if record]
    return "\n\n".join(["\n".join(rows), *parts])


def entry(names: str, text: str) -> str:
    """One option or argument, as ``--help`` shows it."""
    what, *notes = re.split(r"\s*\[((?:default|required|env var)[^]]*)\]$", " ".join(text.split()))
    head = ", ".join([f"`{names}`", *filter(None, notes)])
    text = html.escape(what, quote=False).replace("*", r"\*")
    return f"{head}\n:   {text or 'As its name says.'}"
