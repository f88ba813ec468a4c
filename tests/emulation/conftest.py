"""A fixture for the emulated kernels as a Python module."""

import importlib.util
from types import ModuleType

import pytest

from tests.helpers import compiled


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The launchers of csrc/launchers.h over emulated kernels."""
    (path,) = (compiled.build("rasa_emulated") / "tests" / "emulation").glob("rasa_emulated.*.so")
    spec = importlib.util.spec_from_file_location("rasa_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
