"""Docstrings of the public names: their sections, and their examples run.

Each example runs alone, in an empty folder with a small checkpoint of the official code, in a
namespace of ``rasa_ext``, ``torch`` and ``model``, a fresh causal language model of two layers, or
``moe_model``, one with four experts in each layer. The Hub is one of this machine.
"""

from __future__ import annotations

import doctest
import inspect
import re

import pytest
import torch

import rasa_ext
from rasa_ext import analysis, distributed, methods, optim, ranks, training
from rasa_ext.nn import rasa_experts, routed
from tests.helpers import experts, oracle, tiny_lm
from tests.helpers.adapters import adapters, patched, trainable_copies
from tests.helpers.hub import local_hub

PUBLIC = {name: getattr(rasa_ext, name) for name in rasa_ext.__all__}
PUBLIC |= {f"distributed.{name}": getattr(distributed, name) for name in distributed.__all__}
PUBLIC |= {f"training.{name}": getattr(training, name) for name in training.__all__}
PUBLIC |= {
    f"methods.{name}": getattr(methods, name)
    for name in methods.__all__
    if name
    not in (
        "AdapterConfig",
        "Factors",
        "Place",
        "Rate",
        "fresh_A",
        "fresh_B",
        "option",
        "read_method",
    )  # for those who add one
}
PUBLIC |= {
    f"{module.__name__}.{name}": each
    for module in (analysis, ranks)
    for name, each in vars(module).items()
    if inspect.isfunction(each) and each.__module__ == module.__name__ and name[0] != "_"
}
PUBLIC |= {each.__name__: each for each in (rasa_experts.RasaBank, rasa_experts.RasaExperts)}
PUBLIC |= {f"routed.{each.__name__}": each for each in (routed.experts_linear,)}
PUBLIC |= {f"optim.{name}": getattr(optim, name) for name in optim.__all__}
DOCUMENTED = {
    name: each for name, each in PUBLIC.items() if inspect.isclass(each) or inspect.isroutine(each)
}
FUNCTIONS = {name: each for name, each in DOCUMENTED.items() if inspect.isroutine(each)}


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    found = trainable_copies(adapters(patched(tiny_lm.make_model(), 8, 1)))
    oracle.write_official(
        tmp_path / "checkpoint",
        oracle.official_tensors(found),
        rank=8,
        k=1,
        alpha=8,
        target_modules=sorted({name.rpartition(".")[2] for name in found}),
    )
    monkeypatch.chdir(tmp_path)
    models = {
        "model": tiny_lm.make_model(),
        "moe_model": experts.model("mixtral", num_local_experts=4),
    }
    with local_hub(monkeypatch, tmp_path / "cache"):
        yield {"rasa_ext": rasa_ext, "torch": torch, **models}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name, namespace):
    before, _, text = inspect.getdoc(DOCUMENTED[name]).partition("\nExample:\n")
    example = doctest.DocTestParser().get_doctest(text, namespace, name, name, before.count("\n"))
    assert example.examples, "no Example"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=told.append).failed == 0, "".join(told)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_result_are_told(name):
    signature, text = inspect.signature(FUNCTIONS[name]), inspect.getdoc(FUNCTIONS[name])
    if signature.parameters:
        arguments = re.search(r"^Args:\n((?:    .*\n|\n)+)", text, re.MULTILINE)
        assert arguments, "no Args"
        entries = re.findall(r"^    (\w[\w, \n]*?):", arguments[1], re.MULTILINE)
        told = [each for entry in entries for each in re.findall(r"\w+", entry)]
        assert sorted(told) == sorted(signature.parameters)
    if signature.return_annotation not in ("None", "Iterator[None]", None):
        assert re.search(r"^Returns:\n    \S", text, re.MULTILINE), "no Returns"
