"""Where the sources are on the web, as git knows it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent


def origin() -> str:
    """The address of git's remote ``origin``, empty where there is none."""
    command = ["git", "-C", str(HERE), "config", "remote.origin.url"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        return ""


def web_address(remote: str) -> str | None:
    """The page of a remote that is a host's (https or ssh), None for a folder.

    >>> web_address("git@host.org:someone/rasa_ext.git")
    'https://host.org/someone/rasa_ext'
    """
    found = re.fullmatch(
        r"(?:https://(?:[^@/]*@)?|(?:ssh://)?git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", remote
    )
    return f"https://{found[1]}/{found[2]}" if found else None
