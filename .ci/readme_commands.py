"""Print a command of the README's section "Two commands".

    python .ci/readme_commands.py demo|tests [README]

Needs only Python, so it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
SECTION = re.compile(r"^## Two commands\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = {"demo": "rasa-ext demo", "tests": "pytest"}


def read(text: str) -> dict[str, str]:
    """Return the two commands by name, from the section's first two blocks of one line each."""
    section = SECTION.search(text)
    if section is None:
        raise SystemExit('README: expected a section "## Two commands"; there is none.')
    blocks = [block.strip() for block in BLOCK.findall(section[1].partition("\n### ")[0])]
    if len(blocks) != len(PROGRAMS) or any("\n" in block for block in blocks):
        raise SystemExit(f"README: expected two commands of one line each, got {blocks}.")
    found = dict(zip(PROGRAMS, blocks, strict=True))
    for name, program in PROGRAMS.items():
        first, *_, last = found[name].split(" && ")
        if not first.startswith('pip install ".[') or not f"{last} ".startswith(f"{program} "):
            raise SystemExit(
                f"README: expected a command that installs and then runs {program}, "
                f"got {found[name]!r}."
            )
    return found


def main() -> None:
    """Print the command that the arguments name."""
    name, *path = sys.argv[1:]
    print(read(Path(*path or [README]).read_text())[name])


if __name__ == "__main__":
    main()
