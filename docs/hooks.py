"""What mkdocs adds while it builds the site: pictures, and the fields of configs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import pictures  # noqa: E402

import rasa_ext.peft  # noqa: E402

FIELDS = {
    "<!-- fields of RasaConfig -->": rasa_ext.RasaConfig,
    "<!-- fields of peft.RasaConfig -->": rasa_ext.peft.RasaConfig,
}


def on_files(files, config):
    """Draws every picture into ``pictures/`` of the site."""
    for name, svg in pictures.draw_all().items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=svg))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts in what is generated, where a page has its mark."""
    for mark, choices in FIELDS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, config_fields(choices))
    return markdown


def config_fields(choices: type) -> str:
    """Markdown: a table of the config's choices, their defaults and help texts."""
    lines = ["| field | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(choices):
        if "help" not in field.metadata:
            continue
        lines.append(f"| `{field.name}` | `{field.default!r}` | {field.metadata['help']} |")
    return "\n".join(lines)
