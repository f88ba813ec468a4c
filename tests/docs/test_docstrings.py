"""Docstrings of public names have all sections, and their examples run."""

import importlib
import inspect

import pytest

import rasa_ext
from rasa_ext import analysis, linalg, methods, training
from rasa_ext.nn import rasa_experts, routed
from tests.helpers import docstrings
from tests.helpers.docstrings import namespace  # noqa: F401 - a fixture

PUBLIC = {name: getattr(rasa_ext, name) for name in rasa_ext.__all__}
PUBLIC |= {
    f"{module}.{name}": getattr(getattr(rasa_ext, module), name)
    for module in ("checkpoint", "patching")
    for name in getattr(rasa_ext, module).__all__
    if name not in ("Group", "Lora", "Plan")
}
PUBLIC["linalg.svd_of_product"] = linalg.svd_of_product
PUBLIC |= {f"training.{name}": getattr(training, name) for name in training.__all__}
OF_METHODS = {"AdapterConfig", "Factors", "LayerSpec", "Rate"}
OF_METHODS |= {"fresh_A", "fresh_B", "option", "read_method"}  # only authors of methods use these
PUBLIC |= {f"methods.{n}": getattr(methods, n) for n in methods.__all__ if n not in OF_METHODS}
PUBLIC |= {
    f"analysis.{name}": each
    for name, each in vars(analysis).items()
    if inspect.isfunction(each) and each.__module__ == analysis.__name__ and name[0] != "_"
}
for each in (rasa_experts.RasaExpertWeight, rasa_experts.RasaExperts):
    PUBLIC[each.__name__] = each
PUBLIC |= {f"routed.{each.__name__}": each for each in (routed.experts_linear,)}
for name in ("output", "data", "models", "parsing"):
    # Other packages' commands use these modules.
    module = importlib.import_module(f"rasa_ext.commands.{name}")
    PUBLIC |= {f"commands.{name}.{each}": getattr(module, each) for each in module.__all__}
DOCUMENTED, FUNCTIONS = docstrings.documented(PUBLIC), docstrings.functions(PUBLIC)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name, namespace):  # noqa: F811
    docstrings.run_example(name, DOCUMENTED[name], namespace)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_result_are_told(name):
    docstrings.check_sections(FUNCTIONS[name])
