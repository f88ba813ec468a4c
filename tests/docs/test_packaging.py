"""The package as such: what importing it brings in, and what its models hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rasa_ext
from tests.helpers.adapters import RANK
from tests.helpers.models import FAMILIES, SEQUENTIAL, ids

OPTIONAL = (
    *("accelerate", "bitsandbytes", "gguf", "matplotlib", "peft", "rich", "torchao", "trl"),
    *("transformers", "typer", "yaml", "rasa_ext.commands", "rasa_ext.peft"),
    "huggingface_hub",
)


def test_the_library_imports_only_torch_safetensors_and_regex():
    """Imported, and where it asks what a base layer is."""
    program = (
        "import sys, torch, rasa_ext, rasa_ext.nn.functional, rasa_ext.ops; from torch import nn\n"
        "rasa_ext.merge_and_unload(rasa_ext.patch_model(nn.Sequential(nn.Linear(4, 4)), 2, k=0))\n"
        f"print(*(name for name in {OPTIONAL!r} if name in sys.modules))"
    )
    root = Path(rasa_ext.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert run.stdout.split() == []


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
