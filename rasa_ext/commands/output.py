"""Shared by the commands: the console, tables, and errors as one sentence, not a traceback."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rasa_ext.commands.working import working

__all__ = ["Overwrite", "command", "console", "progress", "progress_bar", "table_of", "working"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

P = ParamSpec("P")

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the output directory holds.")
]
"""The option of a command that writes a directory."""

console = Console(highlight=False, soft_wrap=True)
"""Where a command prints what it was asked for."""
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
progress = _errors
"""For signs of life, which are no part of what a command was asked for."""


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: expected errors end it with a sentence on stderr and exit code 1.

    Args:
        function: of the command's arguments and options, as typer reads them.

    Returns:
        The command. An installed package announces it by the entry-point group
        ``rasa_ext.commands``.

    Raises:
        typer.Exit: on errors that are no fault of the program, such as ValueError and OSError.

    Example:
        >>> from rasa_ext.commands.output import command
        >>> @command
        ... def count(folder: str) -> None:
        ...     print(len(os.listdir(folder)), "files")
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet()
        _keep_lines_whole()
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _errors.print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            told = _told(error, str(kwargs.get("output") or "the output"))
            if told is None or logging.getLogger("rasa_ext").isEnabledFor(logging.DEBUG):
                raise
            _errors.print("Error:", style="bold red", end=" ")
            _errors.print(told, markup=False)
            raise typer.Exit(1) from None

    return wrapped


def progress_bar() -> Progress:
    """Make a bar for work whose parts are counted.

    Returns:
        The bar, which shows nothing where the output is a file or a pipe.

    Example:
        >>> from rasa_ext.commands.output import progress_bar
        >>> with progress_bar() as bar:
        ...     task = bar.add_task("Layers", total=2)
        ...     bar.update(task, completed=2)
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _keep_lines_whole() -> None:
    """Let no table cut a name short where the output is a file or a pipe, which has no width."""
    for each in (console, _errors):
        if not each.is_terminal:
            each.width = 10_000


def _told(error: Exception, output: str) -> str | None:
    """The sentence for an error that is no fault of the program; None for another.

    ``output`` is where the command writes, for errors that do not say where they were met.
    """
    from rasa_ext.checkpoint.writing import WriteError, is_full, write_error

    if isinstance(error, WriteError):
        return str(error)
    file = getattr(error, "filename", None)
    if is_full(error):  # while some library wrote
        return str(write_error(file or output, error, "what was written before is whole"))
    if isinstance(error, OSError) and file is not None:
        return f"{file}: {str(error.strerror).lower()}."
    return str(error) if isinstance(error, ValueError | TypeError | OSError) else None


def table_of(first: str, *numbers: str) -> Table:
    """Make an empty table: a column of names that may wrap, and columns of numbers.

    Args:
        first: the heading of the names.
        numbers: those of the other columns.

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


def _quiet() -> None:
    """Keep other libraries' progress bars and advice out of the way of the command's own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def sentence(message: Warning | str, *_: object, **__: object) -> str:
    """Format a warning for who runs a command, to whom a line of its source says nothing."""
    return f"Warning: {message}\n"
