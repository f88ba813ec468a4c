"""rasa_research uses only public names of rasa_ext, and documents its own public names."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import rasa_ext
import rasa_research
from rasa_research import checkpoint, methods, optim, ranks, solver, training
from tests.docs.conftest import models, run_page  # noqa: F401 - fixtures
from tests.helpers import docstrings
from tests.helpers.docstrings import namespace  # noqa: F401 - a fixture
from tests.helpers.pages import RESEARCH, check_commands

FOLDER = Path(rasa_research.__file__).parent
MODULES = (
    "rasa_ext",
    *(f"rasa_ext.{name}" for name in ("checkpoint", "linalg", "methods", "nn")),
    *(f"rasa_ext.{name}" for name in ("patching", "training", "commands.output", "commands.data")),
    *(f"rasa_ext.commands.{name}" for name in ("models", "parsing")),
)
CORE = {name: set(importlib.import_module(name).__all__) for name in MODULES}
"""The public names of each public module."""
PUBLIC = {f"optim.{name}": getattr(optim, name) for name in optim.__all__}
PUBLIC |= {f"ranks.{name}": getattr(ranks, name) for name in ranks.__all__}
PUBLIC |= {f"solver.{name}": getattr(solver, name) for name in solver.__all__}
PUBLIC |= {f"checkpoint.{name}": getattr(checkpoint, name) for name in checkpoint.__all__}
PUBLIC |= {f"methods.{name}": getattr(methods, name) for name in methods.__all__}
PUBLIC |= {f"training.{name}": getattr(training, name) for name in training.__all__}
DOCUMENTED, FUNCTIONS = docstrings.documented(PUBLIC), docstrings.functions(PUBLIC)


def private(source: str) -> list[str]:
    """Return the names of rasa_ext that a module uses although they are not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name not in CORE]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            public = CORE.get(str(node.module), ())
            found += [f"{node.module}.{e.name}" for e in node.names if e.name not in public]
        elif isinstance(node, ast.Attribute) and (public := CORE.get(ast.unparse(node.value))):
            found += [] if node.attr in public else [ast.unparse(node)]
    return [name for name in found if name.partition(".")[0] == "rasa_ext"]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda p: p.stem)
def test_it_uses_public_names_alone(path):
    assert private(path.read_text()) == []


def test_private_names_are_noticed():
    source = "import rasa_ext\nfrom rasa_ext.{} import {}\nrasa_ext.{}\nimport rasa_ext.{}"
    assert private(source.format("methods", "Factors", "methods.LayerSpec.name", "methods")) == []
    assert private(source.format("methods", "_f", "ops.pack", "ops.pack")) == [
        "rasa_ext.methods._f",
        "rasa_ext.ops.pack",
        "rasa_ext.ops",
    ]
    assert private(source.format("patching.state", "unwrap", "methods.base", "ops")) == [
        "rasa_ext.patching.state.unwrap",
        "rasa_ext.ops",
        "rasa_ext.methods.base",
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name, namespace):  # noqa: F811
    docstrings.run_example(name, DOCUMENTED[name], namespace)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_result_are_told(name):
    docstrings.check_sections(FUNCTIONS[name])


def test_the_pages_have_every_public_name():
    text = "".join(page.read_text() for page in RESEARCH)
    assert set(re.findall(r"^rasa_research\.([\w.]+)$", text, re.MULTILINE)) == set(DOCUMENTED)


@pytest.mark.parametrize("page", RESEARCH, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, run_page):  # noqa: F811
    assert run_page(page) == []
    check_commands(page)


def test_it_is_of_the_core_s_version():
    assert version("rasa-ext-research") == rasa_ext.__version__
