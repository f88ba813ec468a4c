"""Adapter folders: write one in any format, edit its config, read its card, refuse large fields."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import rasa_ext
from rasa_ext.methods import AdapterConfig
from tests.helpers.adapters import LargestTensor
from tests.helpers.models import LLAMA

FORMS = ["adapter", "peft", "mlx"]


def write(form: str, adapted, directory: Path, **options) -> None:
    if form == "adapter":
        rasa_ext.save_adapter(adapted, directory, **options)
    else:
        rasa_ext.export_lora(adapted, directory, format=form, **options)


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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
