"""Print the changelog's section of a release, or fail if the tag must not be released.

    python .ci/release_notes.py v0.1.0

The tag must match the version in rasa_ext/_version.py and CITATION.cff, and the changelog's newest
section must be of that version and have a date. Needs only Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## (\S+) \((.*)\)$", re.MULTILINE)


def notes(tag: str, root: Path = ROOT) -> str:
    """Return the section's text. Raises SystemExit, with advice, if a file contradicts the tag."""
    for name, pattern in (
        ("rasa_ext/_version.py", r'^__version__ = "(.+)"$'),
        ("CITATION.cff", r"^version: (\S+)$"),
    ):
        found = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        version = found[1] if found else "no version"
        if tag != f"v{version}":
            raise SystemExit(
                f"tag: expected v{version}, the version of {name}, got {tag}; commit the version "
                "first, then tag that commit."
            )
    text = (root / "CHANGELOG.md").read_text()
    newest = HEADING.search(text)
    heading = f"## {tag[1:]} (YYYY-MM-DD)"
    if newest is None or newest[1] != tag[1:] or not re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2]):
        got = newest[0] if newest else "none"
        raise SystemExit(f"CHANGELOG.md: expected {heading!r} as the first section, got {got!r}.")
    following = HEADING.search(text, newest.end())
    return text[newest.end() : following.start() if following else None].strip()


def main() -> None:
    """Print the notes of the tag in the arguments."""
    (tag,) = sys.argv[1:]
    print(notes(tag))


if __name__ == "__main__":
    main()
