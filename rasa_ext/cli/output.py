"""Shared by the commands: the console, tables, and errors as one sentence, not a traceback."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import ParamSpec

import typer
from rich.console import Console
from rich.table import Table

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

P = ParamSpec("P")

console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: expected errors end it with a sentence on stderr and exit code 1."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet()
        try:
            function(*args, **kwargs)
        except (ValueError, TypeError, FileNotFoundError, NotADirectoryError) as error:
            if logging.getLogger("rasa_ext").isEnabledFor(logging.DEBUG):
                raise
            _errors.print("Error:", style="bold red", end=" ")
            _errors.print(str(error), markup=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _errors.print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def table_of(first: str, *numbers: str) -> Table:
    """An empty table: a column of names that may wrap, and columns of numbers."""
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
