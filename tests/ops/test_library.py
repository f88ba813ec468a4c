"""A compiled library that does not load: nothing fails, and the first use of CUDA warns."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import rasa_ext
from rasa_ext.ops import library

PROGRAM = """
import importlib.util, sys, warnings
from types import SimpleNamespace

direct = importlib.util.find_spec
def find_spec(name, package=None):
    return SimpleNamespace(origin=sys.argv[1]) if name == "rasa_ext._C" else direct(name, package)
importlib.util.find_spec = find_spec

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from rasa_ext import ops

def linear(device):
    sizes = ((5, 4), (3, 4), (2, 4), (2, 3))
    x, weight, Ap, Bp = (torch.ones(size, device=device) for size in sizes)
    assert ops.low_rank_linear(x, weight, None, Ap, Bp)[0].shape == (5, 3)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    linear("cpu")
    assert not caught
    with FakeTensorMode():  # of a device that need not be there
        linear("cuda")
        linear("cuda")
(warning,) = caught
print(warning.category.__name__, warning.filename, warning.message)
"""


def test_the_first_use_of_cuda_warns_once_with_the_reason(tmp_path):
    path = tmp_path / "_C.so"
    path.write_text("no library")
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    category, file, message = done.stdout.split(maxsplit=2)
    assert category == "RuntimeWarning"
    assert file == "<string>", "it points to the caller"
    assert f"not in use: the compiled library {path} does not load (" in message
    assert "every operator runs as PyTorch operations" in message


@pytest.mark.parametrize(("value", "off"), [("0", True), ("1", False)])
def test_a_variable_turns_the_library_off(value, off, tmp_path, monkeypatch):
    monkeypatch.setenv("RASA_EXT_CUDA", value)
    there = SimpleNamespace(origin=str(tmp_path / "_C.so"))
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda _: there)
    compiled, broken, reason = library._load()
    assert (compiled, broken) == (False, not off)
    assert ("RASA_EXT_CUDA=0 turns" in reason) == off
    monkeypatch.setattr(library, "_REASON", reason)
    monkeypatch.setattr(library.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "BROKEN", broken)
    assert reason in rasa_ext.cuda_status()
