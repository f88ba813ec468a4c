"""Adapters on the Hub, found by id; and the client that reaches it, which may be missing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rasa_ext.checkpoint.files import CONFIG, WEIGHTS

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def client(argument: str) -> Any:
    """Give the package huggingface_hub; ImportError, with what to install, where it is missing."""
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{argument}: the Hub is reached with the package huggingface_hub: pip install "
            "huggingface_hub."
        ) from None
    return huggingface_hub


def located(directory: str | os.PathLike[str]) -> Path:
    """Give a directory as it is, or where the adapter of that id on the Hub was downloaded to.

    Raises FileNotFoundError where there is neither.
    """
    path, name = Path(directory), os.fspath(directory)
    if path.exists() or not _REPOSITORY.fullmatch(name):
        return path
    try:
        return Path(client("directory").snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (ImportError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"directory: expected an adapter's directory, or its id on the Hub, got {name!r}; "
            f"there is no such directory here, and of the Hub it says: {reason}"
        ) from error
