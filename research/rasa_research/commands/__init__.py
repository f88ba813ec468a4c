"""Commands of ``rasa-ext``, a module each; pyproject.toml announces them."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rasa_ext.commands.output import console


def progress_bar() -> Progress:
    """A bar for work whose parts are counted; it shows nothing in a file or a pipe."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
