"""Adapter folders: write one in any format, read its tensors or card, edit its config."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

import rasa_ext
from rasa_ext.methods import AdapterConfig
from tests.helpers import tiny_lm
from tests.helpers.adapters import RANK, LargestTensor, patched, same_tensors
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused

FORMS = ["adapter", "peft", "mlx"]


def tuned_lm(base: str | None = "owner/Tiny-LM", rank: int = RANK, **options) -> nn.Module:
    """Return a patched tiny Llama with random adapters, over a base of this name."""
    plain = tiny_lm.make_model()
    plain.config._name_or_path = base
    return patched(plain, rank, 1, **options)


def write(form: str, adapted, directory: Path, **options) -> None:
    if form == "adapter":
        rasa_ext.save_adapter(adapted, directory, **options)
    else:
        rasa_ext.export_lora(adapted, directory, format=form, **options)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of an adapter, or of a LoRA for PEFT."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def changes_in(folder: Path) -> dict[str, Tensor]:
    """Return dW of every module in a LoRA's files, alpha / r B A; (experts, out, in) of a stack.

    vLLM and SGLang take pairs of rank r alone; llama.cpp divides alpha by the rank of each pair.
    """
    config, tensors = read(folder)
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        A, B = tensors.pop(key).double(), tensors.pop(key.replace("_A.", "_B.")).double()
        assert A.shape[-2] == B.shape[-1] == config["r"], key
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        found[name] = config["lora_alpha"] / config["r"] * B @ A
    assert not [key for key in tensors if ".lora_" in key]
    return found


def same_exports(folder: Path, *models: nn.Module, **options) -> bool:
    """Return whether two models' adapters are exported as the same LoRA."""
    for name, model in zip("ab", models, strict=True):
        rasa_ext.export_lora(model, folder / name, **options)
    return same_tensors(*(read(folder / name)[1] for name in "ab"))


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def not_loaded(load: Callable, model: nn.Module, folder: Path, *said: str) -> None:
    """Check that loading the folder into the model is refused, and leaves the model unchanged."""
    refused(lambda: load(model, folder), model, *said)


def card(directory: Path) -> str:
    return (directory / "README.md").read_text()


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|`]+) \| ([^|]+) \|$", text, re.MULTILINE))


def code(text: str, language: str = "python") -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def check_large_field(config: AdapterConfig, field: str, value, folder: Path) -> None:
    """Check that a field of a large value is refused before a tensor of that size is made."""
    rasa_ext.save_adapter(rasa_ext.patch_model(LLAMA.build(), config=config), folder)
    edit(folder, **{field: value})
    base = LLAMA.build()
    with LargestTensor() as made, pytest.raises(ValueError, match=r"rank|k:|shape|missing"):
        rasa_ext.load_adapter(base, folder)
    assert made.numel < 10**6
