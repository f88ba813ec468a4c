"""README and docs: code blocks run, commands and options exist.

Blocks of a page run in order, in one namespace and one folder, on tiny models: whatever name
``from_pretrained`` is given that is no folder stands for a two-layer model of random numbers. A
Python block whose first line names a file (``# train.py``) becomes that file, and a shell command
that starts it is run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rasa_ext
from rasa_ext.commands.app import app
from tests.helpers import docstrings, lora_server, tiny_lm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "examples")]  # the latter for pages that copy one

import pictures  # noqa: E402

RESEARCH = sorted((ROOT / "docs" / "research").glob("*.md"))
"""Pages of rasa-ext-research, whose tests run them."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(set((ROOT / "docs").rglob("*.md")) - set(RESEARCH)),
]
BLOCK = re.compile(r"^( *)```(python|bash)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"# (\w+\.py)\n")
COMMANDS = typer.main.get_command(app).commands


def blocks(page: Path, language: str | None = None) -> list[tuple[str, str, int]]:
    """(language, text, line) of the fenced code blocks of a page."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        if language in (None, match[2]):
            code = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
            found.append((match[2], code, text.count("\n", 0, match.start(3))))
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block, environment variables before it left out."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(without_variables, split) if words]


def without_variables(words: list[str]) -> list[str]:
    start = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word)), 0)
    return words[start:]


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """A folder to run a page in: hub names stand for a tiny model; files that pages read exist."""
    # Widths of whole blocks of 64, which quantized bases want.
    widths = {"hidden_size": 64, "intermediate_size": 128}
    tiny = tiny_lm.save_base(tmp_path / "tiny", **widths)
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        real = kind.from_pretrained

        def load(name, *args, real=real, **options):
            return real(name if Path(name).is_dir() else tiny, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", staticmethod(load))
    docstrings.write_official(tmp_path / "checkpoint", **widths)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SERVER = "http://localhost:8000"


@pytest.fixture
def server(page, offline):
    """The address of a server that takes LoRAs over the tiny model, for pages that speak to one."""
    if SERVER not in page.read_text():
        yield SERVER
        return
    with lora_server.serving(AutoModelForCausalLM.from_pretrained(offline / "tiny")) as running:
        yield running.address


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_code_runs(page, offline, server, forked_python):
    run_code(page, offline, server, forked_python)


def run_code(page: Path, folder: Path, server: str, python: Path) -> None:
    """Run a page's code in a folder; its scripts by the program ``python``."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, text, line in blocks(page):
        text = text.replace(SERVER, server)
        if language == "bash":
            run_scripts(text, folder, python)
        elif script := SCRIPT.match(text):
            (folder / script[1]).write_text(text)
        else:
            # Blank lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * line + text, str(page), "exec"), namespace)


def run_scripts(text: str, folder: Path, python: Path) -> None:
    """Run those commands that start a script of the page."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with socket.create_server(("localhost", 0)) as free:  # another run may have torchrun's own
        variables["PET_MASTER_PORT"] = str(free.getsockname()[1])
    for words in commands(text):
        if any((folder / word).is_file() for word in words if word.endswith(".py")):
            program = [] if words[0] == "python" else [shutil.which(words[0], path=path)]
            command = [python, *program, *words[1:]]
            done = subprocess.run(
                command, cwd=folder, env=variables, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr


WITH_SHELL = [page for page in PAGES if blocks(page, "bash")]


@pytest.mark.parametrize("page", WITH_SHELL, ids=lambda page: page.name)
def test_commands_exist(page):
    check_commands(page)


def check_commands(page: Path) -> None:
    for _, text, _ in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for words in commands(text):
            check(words)


def check(words: list[str]) -> None:
    """A command's parts that this repository decides: subcommands, options, modules, extras."""
    program, *rest = words
    if program == "rasa-ext":
        assert rest[0] in COMMANDS, words
        known = {option for each in COMMANDS[rest[0]].params for option in each.opts}
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


def test_the_checks_notice():
    for line in (
        "rasa-ext nothing",
        "rasa-ext merge adapter --nothing",
        "python -m benchmarks.nothing",
        "benchmarks/nothing.sh",
        'pip install ".[nothing]"',
    ):
        with pytest.raises(AssertionError):
            check(commands(line)[0])
    assert commands('A=1 x \\\n "b c" && y  # z') == [["x", "b c"], ["y"]]


@pytest.mark.parametrize("k", [1, 3])
def test_pictures_use_the_package_s_numbers(k):
    layers, rank, side = 6, 4, 16
    stack = nn.Sequential(*(nn.Linear(side, side) for _ in range(layers)))
    (row,) = rasa_ext.summary(rasa_ext.patch_model(stack, rank, k))
    assert pictures.effective_rank(layers, rank, k) == row.R
    assert pictures.trainable_parameters(layers, rank, k, side, side) == row.trainable


def test_pictures_are_drawn_the_same_every_time():
    drawn = pictures.draw_all()
    assert drawn == pictures.draw_all()
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for svg in drawn.values())
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    shown = set(re.findall(r"pictures/(\w+)\.svg", pages))
    assert {f"{name}{scheme}" for name in shown for scheme in ("", "-dark")} == set(drawn)
