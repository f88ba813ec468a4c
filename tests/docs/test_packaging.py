"""The package as such: what importing it brings in, its public names, its types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rasa_ext
from tests.helpers.adapters import RANK
from tests.helpers.models import FAMILIES, SEQUENTIAL, ids

MODULES = ("rasa_ext", "rasa_ext.nn.functional", "rasa_ext.ops")
OPTIONAL = ("transformers", "peft", "typer", "rich", "accelerate", "matplotlib", "yaml", "gguf")


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """The optional modules that are there after each import, in this order, of one process."""
    program = (
        "import importlib, json, sys\n"
        f"for module in {MODULES!r}:\n"
        "    importlib.import_module(module)\n"
        f"    print(json.dumps([module, [m for m in {OPTIONAL!r} if m in sys.modules]]))"
    )
    root = Path(rasa_ext.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("module", MODULES)
def test_importing_needs_only_torch_and_safetensors(module, imported):
    assert imported[module] == []


@pytest.mark.parametrize("k", [0, 1, RANK])
@pytest.mark.parametrize("entry", [*FAMILIES, SEQUENTIAL], ids=ids)
def test_a_state_dict_holds_nothing_twice(entry, k):
    """Beyond what the plain model ties itself, no storage stands under two names."""
    base = entry.build()

    def repeats(model) -> int:
        addresses = [v.data_ptr() for v in model.state_dict().values() if v.numel()]
        return len(addresses) - len(set(addresses))

    before = repeats(base)
    plain_entries = len(base.state_dict())
    model = rasa_ext.patch_model(base, RANK, k)
    assert repeats(model) == before
    assert len(model.state_dict()) == plain_entries + len(rasa_ext.adapter_parameters(model))
