"""Regular expressions over the names of layers, matched without backtracking.

A downloaded config may hold one for which Python's own matcher tries every way to divide a name,
such as ``(.*)*x``. Here all places in the name that a part of the pattern leads to are one set.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

try:
    from re import _compiler, _parser  # type: ignore[attr-defined]  # Python's own, with no types
except ImportError:  # before Python 3.11
    import sre_compile as _compiler
    import sre_parse as _parser

_MOST_CHARACTERS, _MOST_REPEATS, _DEEPEST = 10_000, 20, 40


class _Node(NamedTuple):
    """A part of a pattern."""

    kind: str
    """sequence, branch, repeat, ahead or behind; or single, for one character or none."""
    parts: tuple[Any, ...]
    """Of a single its compiled pattern, otherwise nodes."""
    least: int = 0
    most: int = 0
    wanted: bool = True


def matches_whole(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches a whole name."""
    node = _parsed(pattern)
    if isinstance(node, re.Pattern):
        return node.fullmatch(name) is not None
    return len(name) in _ends(node, name, 0, {})


def matches_end(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches the end of a name, from its beginning or a dot on."""
    node = _parsed(pattern)
    begins = [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
    if isinstance(node, re.Pattern):
        return any(node.fullmatch(name, at) for at in begins)
    memo: dict[tuple[int, int], set[int]] = {}
    return any(len(name) in _ends(node, name, at, memo) for at in begins)


def check_pattern(field: str, pattern: str) -> None:
    """Raise ValueError, naming the field, for what is no regular expression, or too large a one."""
    try:
        _parsed(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        shown = pattern if len(pattern) < 200 else f"{pattern[:200]}..."
        raise ValueError(
            f"{field}: expected a regular expression, got {shown!r} ({error})."
        ) from None


@functools.lru_cache(maxsize=256)
def _parsed(pattern: str) -> _Node | re.Pattern[str]:
    compiled, tree = re.compile(pattern), _parser.parse(pattern)
    kinds: list[str] = []
    node = _node(tree, tree.state.flags, kinds, 0)
    if kinds.count("branch") < 2 and kinds.count("branch") == len(kinds):
        return compiled  # names and alternatives, in which nothing repeats
    if len(pattern) > _MOST_CHARACTERS or kinds.count("repeat") > _MOST_REPEATS:
        raise ValueError(
            f"of at most {_MOST_CHARACTERS} characters and {_MOST_REPEATS} repetitions"
        )
    return node


def _node(tree: Any, flags: int, kinds: list[str], depth: int) -> _Node:
    """Make the node of a sequence; ``kinds`` collects those of nodes in it that are not single."""
    if depth > _DEEPEST:
        raise ValueError(f"of at most {_DEEPEST} levels")
    parts = []
    for item in tree:
        name, value = str(item[0]), item[1]

        def inner(part: Any, its_flags: int = flags) -> _Node:
            return _node(part, its_flags, kinds, depth + 1)

        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            single = _compiler.compile(_parser.SubPattern(tree.state, [item]), flags)
            parts.append(_Node("single", (single,)))
            continue
        if name == "SUBPATTERN":
            _, added, removed, part = value
            parts.append(inner(part, (flags | added) & ~removed))
            continue
        if name == "BRANCH":
            kinds.append("branch")
            parts.append(_Node("branch", tuple(map(inner, value[1]))))
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            kinds.append("repeat")
            parts.append(_Node("repeat", (inner(value[2]),), int(value[0]), int(value[1])))
        elif name in ("ASSERT", "ASSERT_NOT"):
            kinds.append("look")
            side = "ahead" if value[0] > 0 else "behind"
            parts.append(_Node(side, (inner(value[1]),), wanted=name == "ASSERT"))
        else:
            raise ValueError(f"without {name.lower().replace('_', ' ')}")
    return _Node("sequence", tuple(parts))


def _ends(node: _Node, text: str, begin: int, memo: dict[tuple[int, int], set[int]]) -> set[int]:
    """Find where in ``text`` a node that begins at one place may end."""
    if (known := memo.get((id(node), begin))) is not None:
        return known

    def after(part: _Node, places: set[int]) -> set[int]:
        return {end for place in places for end in _ends(part, text, place, memo)}

    found = {begin}
    if node.kind == "single":
        match = node.parts[0].match(text, begin)
        found = {match.end()} if match else set()
    elif node.kind == "sequence":
        for part in node.parts:
            found = after(part, found)
    elif node.kind == "branch":
        found = {end for part in node.parts for end in _ends(part, text, begin, memo)}
    elif node.kind == "repeat":
        # After as many times as the text has letters nothing changes any more.
        for _ in range(min(node.least, len(text) + 1)):
            found = after(node.parts[0], found)
        new = found
        for _ in range(min(node.most - node.least, len(text) + 1)):
            new = after(node.parts[0], new) - found
            found = found | new
    else:
        begins = [begin] if node.kind == "ahead" else range(begin + 1)
        ends = [_ends(node.parts[0], text, each, memo) for each in begins]
        there = any(each if node.kind == "ahead" else begin in each for each in ends)
        found = {begin} if there == node.wanted else set()
    memo[id(node), begin] = found
    return found
