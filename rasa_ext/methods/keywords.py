"""Errors for argument names of other libraries, which suggest the name to use."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Names in PEFT, the official code and this package: each function knows one of a set.
_SAME = (
    {"r", "rank", "lora_rank"},
    {"k", "rasa_k"},
    {"alpha", "lora_alpha", "rasa_alpha"},
    {"dropout", "lora_dropout", "rasa_dropout"},
    {"groups", "rasa_groups"},
    {"target_modules", "targets", "modules"},
    {"adapter_dtype", "dtype"},
)


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for an unknown name, suggesting the likely one."""
    for name in given:
        if name not in known:
            meant = [other for same in _SAME if name in same for other in same if other in known]
            meant = meant or difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {meant[0]}?" if meant else f"expected one of {', '.join(known)}."
            # Python's wording, by which PEFT recognizes a config of a newer version.
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {hint}")


def suggests_keywords(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap a function so that the error for an unknown keyword suggests the likely one."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        check_keywords(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return checked
