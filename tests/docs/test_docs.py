"""README and docs: pages run from top to bottom, commands and options exist, pictures match."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from huggingface_hub import constants
from torch import nn
from transformers import AutoModelForCausalLM

import rasa_ext
from rasa_ext.commands.app import app
from tests.helpers import lora_server, pages

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import pictures  # noqa: E402

RESEARCH = sorted((ROOT / "docs" / "research").glob("*.md"))
"""Pages of rasa-ext-research, which research/tests run."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(set((ROOT / "docs").rglob("*.md")) - set(RESEARCH)),
]
FENCE = re.compile(r"^ *```(\w+)", re.MULTILINE)
GENERATED = re.compile(r"^<!-- .*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
"""Parts generated from docstrings; test_docstrings.py runs their examples."""
NOT_RUN = {
    "benchmarks.md": 1,
    "compatibility.md": 2,
    "distributed.md": 2,
    "engines.md": 4,
    "files.md": 3,
    "install.md": 1,
    "lora-pro.md": 1,
    "memory.md": 1,
    "peft.md": 1,
    "quantized.md": 2,
    "reproduce.md": 1,
    "rl.md": 2,
    "serving.md": 3,
    "solver.md": 1,
    "sora.md": 1,
}
"""Number of blocks per page that need something missing here, such as a GPU, and say so."""
ANSWERS = {"README.md": 1, "tutorial.md": 2}
"""Number of outputs per page with sentences that only the real model writes."""
COMMANDS = typer.main.get_command(app).commands
SERVER = "http://localhost:8000"
"""Address of the LoRA server on pages that send requests to one."""


def blocks(page: Path, language: str | None = None) -> list[tuple[str, str]]:
    """Return (language, text) of a page's blocks of ``language``, by default Python and shell."""
    return [
        (kind, code)
        for kind, code in map(pages.code_of, pages.BLOCK.finditer(page.read_text()))
        if kind in (("python", "bash") if language is None else (language,))
    ]


def commands(text: str) -> list[list[str]]:
    """Return the words of each command in a shell block, without leading variable settings."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(without_variables, split) if words]


def without_variables(words: list[str]) -> list[str]:
    start = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word)), 0)
    return words[start:]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Return a folder with the hub cache that pages read, and ``smollm2``."""
    folder = tmp_path_factory.mktemp("models")
    pages.save_models(folder)
    return folder


@pytest.fixture
def run_page(models, tmp_path, monkeypatch, forked_python):
    """Return a function that runs a page in a fresh folder and returns the outputs that differ."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "hub"))
    pages.write_programs(tmp_path / "bin", forked_python)
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    for path in (models, folder):
        monkeypatch.syspath_prepend(path)

    def run(page: Path) -> list[str]:
        run = functools.partial(pages.run, page, tmp_path / "bin", models)
        if SERVER not in page.read_text():
            return run()
        base = AutoModelForCausalLM.from_pretrained(pages.HUB_NAME)
        with lora_server.serving(base) as running:
            return run((SERVER, running.address))

    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, run_page):
    differing = run_page(page)
    assert len(differing) == ANSWERS.get(page.name, 0), "\n".join(differing)


def test_a_page_that_cannot_be_followed_is_seen(run_page, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\n```python\nprint(x)\n```\n\n```text\n3\n```\n")
    assert run_page(page) == ["3\n\nwas printed as\n2\n"]
    for block in ("```bash\nfalse\ntrue\n```\n", "```python\nassert x == 2\n```\n"):
        page.write_text(block)
        with pytest.raises((AssertionError, NameError)):
            run_page(page)
    page.write_text("```bash\n# Not run by the tests:\nfalse\n```\n")
    with pytest.raises(AssertionError):  # the comment gives no reason
        run_page(page)


def test_what_is_not_run_is_counted():
    found = {page.name: len(pages.NOT_RUN.findall(page.read_text())) for page in PAGES + RESEARCH}
    assert {name: count for name, count in found.items() if count} == NOT_RUN
    written = (GENERATED.sub("", page.read_text()) for page in PAGES + RESEARCH)
    fences = {kind for text in written for kind in FENCE.findall(text)}
    assert fences <= {"python", "bash", "text", "json", "yaml", "math", "bibtex"}


WITH_SHELL = [page for page in PAGES if blocks(page, "bash")]


@pytest.mark.parametrize("page", WITH_SHELL, ids=lambda page: page.name)
def test_commands_exist(page):
    check_commands(page)


def check_commands(page: Path) -> None:
    for _, text in blocks(page, "bash"):
        if not (pages.NOT_RUN.match(text) or "pip" in text):
            continue  # test_a_page_can_be_followed runs it
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for words in commands(text):
            check(words)


def test_modules_exist():
    """Modules in code, sentences and tables must exist."""
    text = "".join(page.read_text() for page in PAGES + RESEARCH)
    modules = set(re.findall(r"python -m ([\w.]*\w)", text))
    assert len(modules) > 20
    assert not [name for name in modules if not importlib.util.find_spec(name)]


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
