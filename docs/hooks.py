"""Hooks of mkdocs: links to the repository, and pictures for the light and dark scheme."""

from __future__ import annotations

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


def on_page_markdown(markdown, page, config, files):
    """Select pictures by the page's color scheme, which may differ from the browser's."""
    return PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", markdown)
