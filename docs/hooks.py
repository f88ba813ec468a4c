"""Hooks of mkdocs: links to the repository, pictures by scheme, and the rank of pages in search."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PICTURE = re.compile(
    r'<picture><source\s[^>]*srcset="([^"]+)">\s*<img\s+src="([^"]+)"[^>]*alt="([^"]+)"></picture>'
)


def on_config(config):
    """Set the addresses of repository, page sources and site from pyproject.toml, if it has any."""
    urls = tomllib.loads(PYPROJECT.read_text())["project"].get("urls", {})
    config.site_url = urls.get("Documentation")
    if "Repository" in urls:
        config.repo_url, config.edit_uri = urls["Repository"], "edit/main/docs/"
        config.repo_name = config.repo_url.rpartition("/")[2]
    return config


def on_page_markdown(markdown, page, config, files):
    """Select pictures by the page's color scheme, which may differ from the browser's.

    In search, pages for developers come after pages for users.
    """
    if any(each.title == "Developers" for each in page.ancestors):
        page.meta["search"] = {"boost": 0.2}
    return PICTURE.sub(both_schemes, markdown)


def both_schemes(picture):
    """Return the Markdown of a picture in a light and a dark scheme."""
    dark, light, text = (" ".join(part.split()) for part in picture.groups())
    return f"![{text}]({light}#only-light)![{text}]({dark}#only-dark)"
