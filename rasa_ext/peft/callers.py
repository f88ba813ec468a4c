"""Stack level of the user's line, below PEFT and the libraries that call it."""

from __future__ import annotations

import sys
from types import FrameType

_BETWEEN = {"rasa_ext", "peft", "transformers", "trl", "torch", "contextlib"}


def users_level() -> int:
    """Return the ``stacklevel`` with which ``warnings.warn`` points at the user's line.

    Call it in the function that warns.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    return level
