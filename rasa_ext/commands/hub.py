"""Whether the hub answers, found out within seconds: its own clients try for half a minute."""

from __future__ import annotations

import functools
import os
import sys
import threading

from huggingface_hub import constants, get_session

_SECONDS = 4.0
"""With the imports of a command, less than ten."""
_SET_BY_USER = constants.is_offline_mode()


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers; looked at once. From then on, where not, the process is offline.

    Offline, what is cached is found and what is not fails at once. Nothing is asked where
    `HF_HUB_OFFLINE` is set.
    """
    if constants.is_offline_mode():
        return False
    answers = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception:  # whatever the HTTP library raises: there was no answer
            return
        answers.set()

    # A thread, since looking up a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    if answers.is_set():
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # has read it as it was imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return False


def not_cached(error: Exception) -> str | None:
    """Say why a name of the hub was not found, and what to do; None where another thing failed.

    The sentence goes on after "is neither a ... nor".
    """
    if not constants.is_offline_mode() or not isinstance(error, OSError):
        return None
    if _SET_BY_USER:
        return "cached on this machine, and HF_HUB_OFFLINE is set: unset it"
    return f"cached on this machine, and {constants.ENDPOINT} does not answer: connect to it"
