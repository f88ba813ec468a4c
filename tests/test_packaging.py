"""The package as such: what importing it brings in, its public names, its types."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rasa_ext
from tests.helpers.adapters import RANK
from tests.helpers.models import FAMILIES, SEQUENTIAL, ids

PUBLIC = {
    "CompressedAdapter",
    "Decomposition",
    "RasaConfig",
    "RasaLinear",
    "RasaPool",
    "SafetensorsFolder",
    "__version__",
    "adapter_parameters",
    "compress",
    "cuda_status",
    "decompose",
    "delta_weight",
    "delta_weights",
    "disable_adapter",
    "distributed",
    "export_lora",
    "fit",
    "import_lora",
    "load_adapter",
    "load_official",
    "merge",
    "merge_and_unload",
    "patch_model",
    "repack",
    "save_adapter",
    "summary",
    "unmerge",
    "unpatch",
}
OPTIONAL = ("transformers", "peft", "typer", "rich", "accelerate", "matplotlib", "yaml", "gguf")


@pytest.mark.parametrize("module", ["rasa_ext", "rasa_ext.nn.functional", "rasa_ext.ops"])
def test_importing_needs_only_torch_and_safetensors(module):
    program = f"import {module}, sys; print(*(m for m in {OPTIONAL!r} if m in sys.modules))"
    root = Path(rasa_ext.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert run.stdout.split() == []


def test_public_names():
    assert set(rasa_ext.__all__) == PUBLIC
    assert len(rasa_ext.__all__) == len(PUBLIC)
    assert all(hasattr(rasa_ext, name) for name in PUBLIC)


def test_public_functions_are_typed_and_documented():
    assert (Path(rasa_ext.__file__).parent / "py.typed").exists()
    for name in PUBLIC - {"__version__"}:
        thing = getattr(rasa_ext, name)
        assert thing.__doc__, name
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not inspect.Signature.empty, name
            for parameter in signature.parameters.values():
                assert parameter.annotation is not inspect.Parameter.empty, (name, parameter)


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
