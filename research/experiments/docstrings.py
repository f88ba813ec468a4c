"""A text task from real code: given a function, write the first line of its docstring.

The functions come from the installed standard library, so figures differ a little between Python
releases; results name the release. Whole modules are held out: training shows no function and no
summary of a held-out module.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "dev", "test"]

# Tests, code that is broken on purpose, and modules that many installations lack.
_SKIPPED = {"test", "tests", "lib2to3", "idlelib", "tkinter", "turtle", "turtledemo"}
_SKIPPED |= {"site-packages", "dist-packages"}
_SHORTEST, _LONGEST = 20, 100
"""Length limits of a summary, in characters: they exclude empty phrases and paragraphs."""
_CODE = 700
"""Length limit of a function's code, in characters; longer functions are left out."""


@dataclass(frozen=True)
class Function:
    """A function's code without its docstring, and the first line of the docstring."""

    module: str
    code: str
    summary: str


def split_of(module: str) -> Split:
    """Return the split of a module: one in ten modules is "dev", two in ten are "test"."""
    place = zlib.crc32(module.encode()) % 10
    return "dev" if place == 0 else "test" if place < 3 else "train"


def functions(split: Split, library: Path | None = None) -> list[Function]:
    """Return the functions of one split, in a fixed order that mixes the modules.

    ``library`` is the folder of the modules and defaults to the standard library. If code or a
    summary occurs several times, only the first function by path is used, across all splits.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    found = [function for function in _all(library) if split_of(function.module) == split]
    return sorted(found, key=lambda each: zlib.crc32(each.code.encode()))


@functools.cache
def _all(library: Path) -> list[Function]:
    found, seen = [], set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED.intersection(parts):
            continue
        # A package counts as one module, because its files quote each other.
        for function in _functions_of(parts[0], path):
            if not seen & {function.code, function.summary}:
                seen |= {function.code, function.summary}
                found.append(function)
    return found


def _functions_of(module: str, path: Path) -> Iterator[Function]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library has some broken files on purpose
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2:
            continue
        summary = " ".join(doc.split("\n\n")[0].split())
        node.body = node.body[1:]
        code = ast.unparse(node)
        if _SHORTEST <= len(summary) <= _LONGEST and len(code) <= _CODE:
            yield Function(module, code, summary)
