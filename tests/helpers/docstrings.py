"""Checks of public docstrings: required sections, and examples that run.

Each example runs by itself, in a folder with only a small checkpoint in the official format. Its
namespace has ``rasa_ext``, ``torch``, ``model`` (a fresh two-layer causal language model) and
``moe_model`` (the same with four experts in each layer). A local server replaces the Hub.
"""

import doctest
import inspect
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import rasa_ext
from tests.helpers import experts, tiny_lm
from tests.helpers.adapters import patched
from tests.helpers.cli import save_official
from tests.helpers.hub import local_hub


def documented(public: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes and functions among public names."""
    return {n: each for n, each in public.items() if inspect.isclass(each)} | functions(public)


def functions(public: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in public.items() if inspect.isroutine(each)}


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    save_official(patched(tiny_lm.make_model(), 8, 1), tmp_path / "checkpoint", rank=8)
    monkeypatch.chdir(tmp_path)
    models = {
        "model": tiny_lm.make_model(),
        "moe_model": experts.model("mixtral", num_local_experts=4),
    }
    with local_hub(monkeypatch, tmp_path / "cache"):
        yield {"rasa_ext": rasa_ext, "torch": torch, **models}


def run_example(name: str, each: Any, namespace: dict[str, Any]) -> None:
    before, _, text = inspect.getdoc(each).partition("\nExample:\n")
    example = doctest.DocTestParser().get_doctest(text, namespace, name, name, before.count("\n"))
    assert example.examples, "no Example"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=told.append).failed == 0, "".join(told)


def check_sections(function: Any) -> None:
    signature, text = inspect.signature(function), inspect.getdoc(function)
    if signature.parameters:
        arguments = re.search(r"^Args:\n((?:    .*\n|\n)+)", text, re.MULTILINE)
        assert arguments, "no Args"
        entries = re.findall(r"^    (\w[\w, \n]*?):", arguments[1], re.MULTILINE)
        told = [each for entry in entries for each in re.findall(r"\w+", entry)]
        assert sorted(told) == sorted(signature.parameters)
    if signature.return_annotation not in ("None", "Iterator[None]", None):
        assert re.search(r"^Returns:\n    \S", text, re.MULTILINE), "no Returns"
