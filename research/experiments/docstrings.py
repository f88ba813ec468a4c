"""A real text task that comes with Python: a function's code, and the first line of its docstring.

Functions are those of the standard library's own files, as they are where this runs, so figures of
two Python releases differ a little; results name the release. Whole modules are held out, so that
no function of a held-out module, nor any summary in it, is met in training.
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

# Tests, code that breaks on purpose, and what many installations leave out.
_SKIPPED = {"test", "tests", "lib2to3", "idlelib", "tkinter", "turtle", "turtledemo"}
_SKIPPED |= {"site-packages", "dist-packages"}
_SHORTEST, _LONGEST = 20, 100
"""Characters of a summary. Shorter ones say nothing; longer ones are paragraphs."""
_CODE = 700
"""Characters of code that are shown; longer functions are left out."""


@dataclass(frozen=True)
class Function:
    """A function without its docstring, and the docstring's first line."""

    module: str
    code: str
    summary: str


def split_of(module: str) -> Split:
    """The split of a module: one in ten to choose by, two in ten to judge by."""
    place = zlib.crc32(module.encode()) % 10
    return "dev" if place == 0 else "test" if place < 3 else "train"


def functions(split: Split, library: Path | None = None) -> list[Function]:
    """The functions of one split, in a fixed order that mixes the modules.

    ``library`` is the folder of the modules, the standard library unless given. Code or a summary
    that stands in several places is taken once, in whichever split has it first by module name.
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
        # A package is one module here: its files quote each other.
        for function in _functions_of(parts[0], path):
            if not seen & {function.code, function.summary}:
                seen |= {function.code, function.summary}
                found.append(function)
    return found


def _functions_of(module: str, path: Path) -> Iterator[Function]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library keeps some broken files on purpose
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
