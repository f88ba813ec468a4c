"""README and docs: pages run from top to bottom, commands and options exist, pictures match."""

import importlib.util
import re

import pictures
import pytest
from torch import nn

import rasa_ext
from tests.helpers import pages
from tests.helpers.pages import (
    ELSEWHERE,
    PAGES,
    RESEARCH,
    ROOT,
    blocks,
    check,
    check_commands,
    commands,
)

FENCE = re.compile(r"^ *```(\w+)", re.MULTILINE)
GENERATED = re.compile(r"^<!-- .*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
"""Parts generated from docstrings; test_docstrings.py runs their examples."""
NOT_RUN = {
    "benchmarks.md": 1,
    "compatibility.md": 2,
    "distributed.md": 4,
    "files.md": 4,
    "install.md": 2,
    "lora-pro.md": 1,
    "memory.md": 1,
    "peft.md": 1,
    "quantized.md": 3,
    "reproduce.md": 1,
    "rl.md": 1,
    "serving.md": 6,
    "solver.md": 1,
    "sora.md": 1,
}
"""Number of blocks per page that need something missing here, such as a GPU, and say so."""
ANSWERS = {"README.md": 1, "docs/index.md": 1, "docs/tutorial.md": 2}
"""Number of outputs per page with sentences that only the real model writes."""


FOLLOWED = [page for page in PAGES if page.name != "recipes.md"]  # tests/examples runs its blocks


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, run_page):
    differing = run_page(page)
    assert len(differing) == ANSWERS.get(str(page.relative_to(ROOT)), 0), "\n".join(differing)


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


def test_pages_can_be_followed_in_one_folder():
    """A command refuses a folder that holds files, so no other page may write there."""
    saved = re.compile(r"(?:save_adapter|save_model|save_pretrained|export_lora)\(.*?\"([\w-]+)\"")
    by_command, pages_of = set(), {}
    for page in (page for page in PAGES if page.parent in (ROOT, ROOT / "docs")):
        run = [(kind, code) for kind, code in blocks(page) if not pages.NOT_RUN.match(code)]
        shell, python = ("".join(c for k, c in run if k == kind) for kind in ("bash", "python"))
        chosen = re.findall(r"--output ([\w-]+)", shell)
        by_command |= set(chosen)
        for folder in {*chosen, *saved.findall(python)}:
            pages_of.setdefault(folder, []).append(page.name)
    assert len(by_command) > 15
    assert {folder: pages_of[folder] for folder in by_command if len(pages_of[folder]) > 1} == {}


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


def test_modules_exist():
    """Modules in code, sentences and tables must exist."""
    text = "".join(page.read_text() for page in PAGES + RESEARCH)
    modules = set(re.findall(r"python -m ([\w.]*\w)", text))
    modules -= set(ELSEWHERE)
    assert len(modules) > 20
    assert not [name for name in modules if not importlib.util.find_spec(name)]


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


def test_every_picture_is_drawn_for_light_and_dark_and_shown():
    drawn = {path.stem for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text() for page in pages)
    shown = {name.removesuffix("-dark") for name in re.findall(r"pictures/([\w-]+)\.svg", text)}
    assert {f"{name}{scheme}" for name in shown for scheme in ("", "-dark")} == drawn
