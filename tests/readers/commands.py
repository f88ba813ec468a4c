"""The command ``rasa-ext`` and what it says is to be run next."""

from __future__ import annotations

import shlex
from pathlib import Path

from typer.testing import CliRunner

from rasa_ext.commands.app import app


def printed(*words: object) -> list[list[str]]:
    """Run the command; the words of the commands that it prints, which are set off by spaces."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    lines = done.output.splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  ")]


def exported(case, folder: Path, *options: object) -> dict[str, tuple]:
    """Each adapter as a LoRA below ``folder``: where it is, and the commands that are printed."""
    found = {}
    for name, path in case.adapters.items():
        words = ("--model", case.base, "--output", folder / name, *options)
        found[name] = (folder / name, *printed("export-lora", path, *words))
    return found
