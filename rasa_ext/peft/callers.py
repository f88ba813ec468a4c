"""The user's line, which PEFT calls this package for, through libraries of its own choice."""

from __future__ import annotations

import sys
from types import FrameType

_BETWEEN = {"rasa_ext", "peft", "transformers", "trl", "torch", "contextlib"}


def users_level() -> int:
    """Give ``warnings.warn`` the stacklevel of the user's line, whatever library called us for it.

    To be called by the function that warns.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    return level
