"""A page of the documentation as a Jupyter notebook: its text, code and output in cells."""

from __future__ import annotations

import re

import nbformat
from nbformat import v4

BASH = "%%bash -e"
"""Not ``!``: that is a terminal, for which bars move, and it goes on after a command that fails."""
LINK = re.compile(r"\[([^]]*)\]\((?!\w+:)[^)]*\)")
BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def from_markdown(page: str) -> str:
    """JSON of the notebook.

    A Python block is a code cell and a shell block one of bash; a text block right after one is
    what it printed. Links to other pages, which do not lie beside a notebook, become their text.
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
