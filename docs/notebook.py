"""A page of the documentation as a Jupyter notebook: its text, code and output in cells."""

from __future__ import annotations

import json
import re
from typing import Any

BASH = "%%bash -e"
"""Not ``!``: that is a terminal, for which bars move, and it goes on after a command that fails."""
LINK = re.compile(r"\[([^]]*)\]\((?!\w+:)[^)]*\)")
BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def from_markdown(page: str) -> str:
    """JSON of the notebook.

    A Python block is a code cell and a shell block one of bash; a text block right after one is
    what it printed. Links to other pages, which do not lie beside a notebook, become their text.
    """
    cells: list[dict[str, Any]] = []
    end = 0
    for block in BLOCK.finditer(page):
        between, language, code = page[end : block.start()], block[1], block[2].rstrip("\n")
        if between.strip():
            cells.append(_cell("markdown", between.strip(), metadata={}))
        if language == "text" and cells and cells[-1]["cell_type"] == "code":
            cells[-1]["outputs"].append(
                {"output_type": "stream", "name": "stdout", "text": _lines(code + "\n")}
            )
        elif language == "text":
            cells.append(_cell("markdown", block[0].strip(), metadata={}))
        else:
            source = code if language == "python" else f"{BASH}\n{code}"
            cells.append(_cell("code", source, metadata={}, outputs=[], execution_count=None))
        end = block.end()
    if page[end:].strip():
        cells.append(_cell("markdown", page[end:].strip(), metadata={}))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, source: str, **rest: Any) -> dict[str, Any]:
    if kind == "markdown":
        source = LINK.sub(r"*\1*", source)
    return {"cell_type": kind, "source": _lines(source), **rest}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
