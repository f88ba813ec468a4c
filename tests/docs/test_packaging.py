"""The package as such: what importing it brings in, and what its models hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rasa_ext

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


@pytest.mark.parametrize("module", ["rasa_ext", "rasa_ext.commands.app"])
def test_help_and_checks_of_options_need_no_torch(module):
    program = f"import sys, {module}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["False"], run.stderr
