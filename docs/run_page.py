"""Run the blocks of a page and insert their output: ``python docs/run_page.py PAGE``.

Blocks run in order in an empty folder; all Python blocks share one process. The output replaces the
``text`` block right after its block, without the middle if it is long. Installs are not run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

BLOCK = re.compile(
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```\n(?P<gap>\n```text\n(?P<old>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
LONGEST, WIDTH = 30, 100
AS_IT_IS = {"replace_whitespace": False, "drop_whitespace": False, "break_on_hyphens": False}
SITE_PACKAGES = sysconfig.get_path("purelib")


def run(page: str) -> str:
    """Run the blocks of a page, and return the page with the new output."""
    namespace: dict[str, object] = {"__name__": "__main__"}

    def run_block(block: re.Match[str]) -> str:
        if block["code"].startswith("pip install"):
            return block[0]
        if block["language"] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(block["code"], namespace)
            printed = stream.getvalue()
        else:
            command = ["bash", "-c", block["code"]]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(printed, file=sys.stderr)
        if block["gap"] is None:
            return block[0]
        printed = printed.replace(f"{os.getcwd()}/", "").replace(SITE_PACKAGES, "site-packages")
        output = shortened(printed.rstrip().splitlines())
        return f"```{block['language']}\n{block['code']}```\n\n```text\n{output}\n```\n"

    return BLOCK.sub(run_block, page)


def shortened(lines: list[str]) -> str:
    """Wrap lines at ``WIDTH``, and replace the middle by dots if there are over ``LONGEST``."""
    stripped = (line.rstrip() for line in lines)  # rows of a table end with spaces
    wrap = functools.partial(textwrap.wrap, width=WIDTH, **AS_IT_IS)
    lines = [part for line in stripped for part in wrap(line) or [""]]
    if len(lines) > LONGEST:
        lines = [*lines[: LONGEST * 2 // 3], "...", *lines[-(LONGEST // 3) :]]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = run(path.read_text())
    path.write_text(text)
