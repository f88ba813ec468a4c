"""Shared by the commands: the console, tables, and errors as one sentence, not a traceback."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import re
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["command", "console", "progress", "table_of", "working"]

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it

P = ParamSpec("P")

# Where a command prints what it was asked for; signs of life and errors are no part of that.
console = Console(highlight=False, soft_wrap=True)
progress = Console(stderr=True, highlight=False, soft_wrap=True)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Make a command of a function, whose errors are a sentence on stderr and exit code 1.

    Keyword-only parameters are options and others arguments, as typer reads them. The help of each
    is in the docstring's section ``Args``, unless the annotation is typer's own.

    Args:
        function: does the work, and is called with the values.

    Returns:
        The command. An installed package announces it by the entry-point group
        ``rasa_ext.commands``.

    Raises:
        typer.Exit: on errors that are no fault of the program, such as ValueError and OSError.

    Example:
        >>> from rasa_ext.commands.output import command
        >>> @command
        ... def count(folder: str) -> None:
        ...     \"\"\"Count files.
        ...
        ...     Args:
        ...         folder: where they are.
        ...     \"\"\"
        ...     print(len(os.listdir(folder)), "files")
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        _prepare()
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            progress.print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            text = _one_sentence(error, str(kwargs.get("output") or "the output"))
            if text is None or logging.getLogger("rasa_ext").isEnabledFor(logging.DEBUG):
                raise
            progress.print("Error:", style="bold red", end=" ")
            progress.print(text, markup=False)
            raise typer.Exit(1) from None

    hints = typing.get_type_hints(function, include_extras=True)
    wrapped.__doc__, helps = documented(function)
    parameters = []
    for each in inspect.signature(function).parameters.values():
        kind = hints[each.name]
        if each.name in helps:
            declare = typer.Option if each.kind is each.KEYWORD_ONLY else typer.Argument
            kind = Annotated[kind, declare(help=helps[each.name])]
        parameters.append(each.replace(annotation=kind))
    vars(wrapped)["__signature__"] = inspect.Signature(parameters)
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def documented(each: Any) -> tuple[str, dict[str, str]]:
    """Give a docstring's text before the section ``Args``, and that section's entries by name."""
    about, _, entries = (inspect.getdoc(each) or "").partition("\nArgs:\n")
    entries, _, _ = entries.partition("\n\n")
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", entries, re.MULTILINE | re.DOTALL)
    return about.rstrip(), {name: " ".join(text.split()) for name, text in found}


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Say what is being done, such as "Loading the model", with a spinner on a terminal.

    Args:
        text: what is done.

    Returns:
        A context.

    Example:
        >>> from rasa_ext.commands.output import working
        >>> with working("Counting"):
        ...     total = sum(range(10))
    """
    progress.print(f"{text} ...", markup=False)
    with progress.status(text):
        yield


def table_of(first: str, *numbers: str) -> Table:
    """Make an empty table: a column of names that may wrap, and columns of numbers.

    Args:
        first: the heading of the names.
        numbers: the headings of the other columns.

    Returns:
        The table, to which ``add_row`` adds.

    Example:
        >>> from rasa_ext.commands.output import console, table_of
        >>> table = table_of("layer", "rank")
        >>> table.add_row("q_proj", "8")
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def pairs_of(rows: dict[str, str]) -> Table:
    """Make a table of two columns without headings."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def sentence(message: Warning | str, *_: object, **__: object) -> str:
    """Format a warning without the line of source code, which users of a command do not need."""
    return f"Warning: {message}\n"


def _prepare() -> None:
    """Silence other libraries' advice; let tables in a file or a pipe, of no width, cut no name."""
    # Read as transformers is imported, which takes seconds and comes later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # as they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for each in (console, progress):
        if not each.is_terminal:
            each.width = 10_000


def _one_sentence(error: Exception, output: str) -> str | None:
    """The sentence for an error that is no fault of the program; None for another.

    ``output`` is where the command writes, for errors that name no file.
    """
    from rasa_ext.writing import WriteError, is_full, write_error

    if isinstance(error, WriteError):
        return str(error)
    file = getattr(error, "filename", None)
    if is_full(error):  # while some library wrote
        return str(write_error(file or output, error, "what was written before is whole"))
    if isinstance(error, OSError) and file is not None:
        return f"{file}: {str(error.strerror).lower()}."
    return str(error) if isinstance(error, ValueError | TypeError | OSError) else None
