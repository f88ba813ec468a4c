"""The commands' shared output: console, tables, and errors as one sentence, not a traceback."""

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
from rich.segment import Segment
from rich.table import Table

__all__ = ["command", "console", "progress", "table_of", "working"]

INTERRUPTED = 130  # the exit code that shells report after Ctrl-C

_SHORT = {"output": ("--output", "-o"), "prompt": ("--prompt", "-p")}

P = ParamSpec("P")


def printable(text: str) -> str:
    """Return a text without control characters, with which a file could steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


class _Console(Console):
    """A console that prints no control characters but rich's own."""

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


# A command prints its results to the console (stdout), and progress and errors to stderr.
console = _Console(highlight=False, soft_wrap=True)
progress = _Console(stderr=True, highlight=False, soft_wrap=True)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn a function into a command: an error becomes one sentence on stderr and exit code 1.

    Keyword-only parameters become options and other parameters arguments. The help of each is read
    from the docstring's section ``Args``, unless its annotation is typer's own.

    Args:
        function: the function to run; it is called with the parsed values.

    Returns:
        The command. An installed package registers it in the entry-point group
        ``rasa_ext.commands``.

    Raises:
        typer.Exit: ``function`` raises a user's error, such as ValueError or OSError, or Ctrl-C is
            pressed. Other errors keep their traceback.

    Example:
        >>> from rasa_ext.commands.output import command
        >>> @command
        ... def count(folder: str) -> None:
        ...     \"\"\"Count files.
        ...
        ...     Args:
        ...         folder: folder with the files.
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
            progress.quiet = False
            progress.print("Error:", style="bold red", end=" ")
            progress.print(text, markup=False)
            raise typer.Exit(1) from None

    hints = typing.get_type_hints(function, include_extras=True)
    wrapped.__doc__, helps = documented(function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if (name := parameter.name) in helps:
            declare = typer.Option if parameter.kind is parameter.KEYWORD_ONLY else typer.Argument
            kind = Annotated[kind, declare(*_SHORT.get(name, ()), help=helps[name])]
        parameters.append(parameter.replace(annotation=kind))
    vars(wrapped)["__signature__"] = inspect.Signature(parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def documented(source: Any) -> tuple[str, dict[str, str]]:
    """Return a docstring's text before the section ``Args``, and the section's entries by name."""
    about, _, entries = (inspect.getdoc(source) or "").partition("\nArgs:\n")
    entries, _, _ = entries.partition("\n\n")
    parts = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", entries, re.MULTILINE | re.DOTALL)
    return about.rstrip(), {name: " ".join(text.split()) for name, text in parts}


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Print the current task, such as "Loading the model", with a spinner on a terminal.

    Args:
        text: the task.

    Returns:
        A context in which the spinner turns.

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
        first: heading of the names.
        numbers: headings of the other columns.

    Returns:
        The table; add rows with ``add_row``.

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
    """Format a warning without its line of source code, which users of a command do not need."""
    return f"Warning: {printable(str(message))}\n"


def _prepare() -> None:
    """Silence other libraries and processes; make files and pipes so wide that no name is cut."""
    # transformers reads these variables when it is imported, which happens later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they log during import
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "Could not find a config file")  # PEFT, of a .gguf base
    for printer in (console, progress):
        # Of the processes that torchrun starts, the first prints; all of them print errors.
        printer.quiet = os.environ.get("RANK", "0") != "0"
        if not printer.is_terminal:
            printer.width = 10_000


def _one_sentence(error: Exception, output: str) -> str | None:
    """Return the sentence for a user's error, or None for a bug.

    ``output`` is the command's output folder, for errors that name no file.
    """
    from rasa_ext.writing import WriteError, is_full, write_error

    if isinstance(error, WriteError):
        return str(error)
    file = getattr(error, "filename", None)
    if is_full(error):  # raised by a library that writes files itself
        return str(write_error(file or output, error, "what was written before is whole"))
    if isinstance(error, OSError) and file is not None:
        return f"{file}: {str(error.strerror).lower()}."
    return str(error) if isinstance(error, ValueError | TypeError | OSError | ImportError) else None
