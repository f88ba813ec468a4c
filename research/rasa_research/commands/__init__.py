"""Commands of ``rasa-ext``, one per module; pyproject.toml lists them."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rasa_ext.commands.output import console


def progress_bar() -> Progress:
    """Make a progress bar with counts; it shows nothing if the output is a file or a pipe."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
