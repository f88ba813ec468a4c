"""Run ``rasa-ext`` and read the commands that its output suggests."""

import shlex
from pathlib import Path

from typer.testing import CliRunner

from rasa_ext.commands.app import app


def printed(*words: object) -> list[list[str]]:
    """Run the command; return the words of each command that it prints on an indented line."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    lines = done.output.splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  ")]


def exported(case, folder: Path, *options: object) -> dict[str, tuple]:
    """Export each adapter as a LoRA below ``folder``; return its path and the printed commands."""
    found = {}
    for name, path in case.adapters.items():
        words = ("--model", case.base, "--output", folder / name, *options)
        found[name] = (folder / name, *printed("export-lora", path, *words))
    return found
