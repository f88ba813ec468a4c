"""A sign of life from what takes long and says nothing by itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console

_EVERY = 8.0
"""Seconds between two lines, where there is no terminal to show that time passes."""


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Say what is being done for the time of the context, such as "Loading the model".

    Args:
        console: where to say it.
        text: what is done.

    Returns:
        A context.

    Example:
        >>> from rasa_ext.commands.output import progress, working
        >>> with working(progress, "Counting"):
        ...     total = sum(range(10))
    """
    console.print(f"{text} ...", markup=False)
    if console.is_terminal:
        with console.status(text):
            yield
        return
    began, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(_EVERY):
            console.print(f"{text}: {time.monotonic() - began:.0f} s", markup=False)

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield
    finally:
        done.set()
        ticking.join()
