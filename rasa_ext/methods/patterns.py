"""Regular expressions over layer names, matched in bounded time.

A downloaded config may have a pattern on which Python's ``re`` never ends, such as ``(.*)*x``.
"""

from __future__ import annotations

import functools
import math
import time

import regex

_SECONDS = 1.0  # CPU time of this thread, for one pattern over all names
_NOTICED = 1e-3  # usual patterns need far less
_MOST_CHARACTERS, _MOST_REPEATS = 100_000, 10_000


class _Pattern:
    """A compiled pattern, and the time left for slow matches."""

    def __init__(self, pattern: str) -> None:
        repeats = math.prod(map(int, regex.findall(r"\{(?:\d*,)?(\d+)\}", pattern)))
        if len(pattern) > _MOST_CHARACTERS or repeats > _MOST_REPEATS:
            raise ValueError(
                f"it may have at most {_MOST_CHARACTERS} characters and {_MOST_REPEATS} counted "
                "repetitions"
            )
        self.compiled = regex.compile(pattern)
        self.left = _SECONDS

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches the whole name."""
        began = time.thread_time()
        try:
            matched = self.compiled.fullmatch(name, timeout=self.left) is not None
        except TimeoutError:
            self.left = 0.0
        if (took := time.thread_time() - began) > _NOTICED:
            self.left -= took
        if self.left <= 0:
            raise ValueError(
                f"expected a regular expression that is matched within {_SECONDS} s, got "
                f"{self.compiled.pattern[:200]!r}."
            )
        return matched


_compiled = functools.lru_cache(maxsize=256)(_Pattern)


def matches_whole(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the whole name; raise ValueError if it takes too long."""
    return _compiled(pattern).matches(name)


def matches_end(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a name from the start or from a dot to the end."""
    return _compiled(rf"(?:.*\.)?(?:{pattern})").matches(name)


def check_pattern(field: str, pattern: str) -> None:
    """Raise ValueError, naming the field, if a regular expression is invalid or too large."""
    try:
        _compiled(pattern)
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        shown = pattern if len(pattern) < 200 else f"{pattern[:200]}..."
        raise ValueError(
            f"{field}: expected a regular expression, got {shown!r} ({error})."
        ) from None
