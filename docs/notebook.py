"""Convert a page of the documentation to a Jupyter notebook."""

from __future__ import annotations

import re

import nbformat
from nbformat import v4

BASH = "%%bash -e"
"""Used instead of ``!``, which is a terminal (progress bars move) and ignores failed commands."""
LINK = re.compile(r"(?<!!)\[([^]]*)\]\((?!\w+:)[^)]*\)")
BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def from_markdown(page: str) -> str:
    """Return the JSON of the notebook.

    Python blocks become code cells, shell blocks bash cells, and a text block right after them
    their output. Links to other pages become italic text, because a notebook is used without the
    pages.
    """
    cells: list[nbformat.NotebookNode] = []
    end = 0

    def add_text(text: str) -> None:
        if text.strip():
            cells.append(v4.new_markdown_cell(LINK.sub(r"*\1*", text.strip())))

    for block in BLOCK.finditer(page):
        language, code = block[1], block[2].rstrip("\n")
        add_text(page[end : block.start()])
        if language == "text" and cells and cells[-1].cell_type == "code":
            cells[-1].outputs.append(v4.new_output("stream", text=f"{code}\n"))
        elif language == "text":
            add_text(block[0])
        else:
            cells.append(v4.new_code_cell(code if language == "python" else f"{BASH}\n{code}"))
        end = block.end()
    add_text(page[end:])
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.writes(v4.new_notebook(cells=cells, metadata=metadata)) + "\n"
