"""Check that the commands on pages of the documentation exist, with their options."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import typer

from rasa_ext.commands.app import app
from tests.helpers.pages import NOT_RUN, ROOT, blocks

COMMANDS = typer.main.get_command(app).commands


def commands(text: str) -> list[list[str]]:
    """Return the words of each command in a shell block, without leading variable settings."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(without_variables, split) if words]


def without_variables(words: list[str]) -> list[str]:
    start = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word)), 0)
    return words[start:]


def check_commands(page: Path) -> None:
    for _, text in blocks(page, "bash"):
        if not (NOT_RUN.match(text) or "pip" in text):
            continue  # test_a_page_can_be_followed runs it
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for words in commands(text):
            check(words)


def check(words: list[str]) -> None:
    """Check the parts of a command that this repository defines.

    These are subcommands, options, modules, scripts and extras.
    """
    program, *rest = words
    if program == "rasa-ext":
        assert rest[0] in COMMANDS, words
        known = {each for p in COMMANDS[rest[0]].params for each in (*p.opts, *p.secondary_opts)}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= known | {"--help"}, (words, given - known)
    elif program.startswith("python") and rest[:1] == ["-m"] and rest[1] not in ("venv", "pip"):
        assert importlib.util.find_spec(rest[1]), words
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK), words
    elif program == "pip":
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= extras(), words


@functools.cache
def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
