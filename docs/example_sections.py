"""How the site reads docstrings: ``Example:`` as code, and the stars of L*k as they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Gives the section the name under which it is highlighted; mkdocstrings sees a remark."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring is not None:
            text, _, example = obj.docstring.value.partition("\nExample:\n")
            text = without_emphasis(text)
            obj.docstring.value = f"{text}\nExamples:\n{example}" if example else text


def without_emphasis(text: str) -> str:
    """Escape stars between letters, which are products, outside code."""
    parts = re.split(r"(`+.*?`+)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<=\w)\*(?=\w)", r"\\*", part) for part in parts[::2]]
    return "".join(parts)
