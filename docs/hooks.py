"""Hooks of mkdocs: links to the repository, pictures by scheme, the demo's notebook as a page."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PICTURE = re.compile(r'<picture>.*srcset="(.+)">\n<img src="(.+?)".* alt="(.+)"></picture>')


def on_config(config):
    """Set the addresses of repository, page sources and site from pyproject.toml, if it has any."""
    urls = tomllib.loads(PYPROJECT.read_text())["project"].get("urls", {})
    config.site_url = urls.get("Documentation")
    if "Repository" in urls:
        config.repo_url, config.edit_uri = urls["Repository"], "edit/main/docs/"
        config.repo_name = config.repo_url.rpartition("/")[2]
    return config


def on_files(files, config):
    """Add the notebook's page, which no file holds."""
    from mkdocs.structure.files import File  # here, since the tests have no mkdocs

    cells = json.loads((Path(config.docs_dir) / "demo.ipynb").read_text())["cells"]
    files.append(File.generated(config, "demo.md", content="\n\n".join(map(shown, cells)) + "\n"))
    return files


def shown(cell):
    """Return a cell of a notebook as markdown, with what it printed."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    printed = "".join("".join(each.get("text", "")) for each in cell["outputs"])
    return f"```python\n{text}\n```" + (f"\n\n```text\n{printed}```" if printed else "")


def on_page_markdown(markdown, page, config, files):
    """Select pictures by the page's color scheme, which may differ from the browser's.

    Links to the notebook lead to its page.
    """
    markdown = markdown.replace("(demo.ipynb)", "(demo.md)")
    return PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", markdown)
