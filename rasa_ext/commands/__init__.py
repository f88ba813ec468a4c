"""The command ``rasa-ext``, with the entry point `main`. It needs the extra ``[train]``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings

NEEDED = (
    *("typer", "rich", "yaml", "transformers", "accelerate", "datasets", "peft", "trl"),
    "matplotlib",
)


def main() -> None:
    """Run the command. If packages are missing, print how to install them and exit with code 1."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"rasa-ext needs {', '.join(missing)}: in a checkout of rasa_ext, run "
            'pip install ".[train]"',
            file=sys.stderr,
        )
        raise SystemExit(1)
    for stream in (sys.stdout, sys.stderr):
        # Data may have letters that the console lacks. A pipe or a file may refuse the change.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="replace")
    from rasa_ext.commands.app import app
    from rasa_ext.commands.output import sentence

    warnings.formatwarning = sentence
    app()
