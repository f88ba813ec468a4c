"""Adapter folders: write one in any format, edit its config, read its model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import rasa_ext

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
