"""What mkdocs adds while it builds the site: links to the repository, pictures as a page is lit."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PICTURE = re.compile(r'<picture>.*srcset="(.+)">\n<img src="(.+?)".* alt="(.+)"></picture>')


def on_config(config):
    """Link to the addresses that pyproject.toml has, if any: repository, sources of pages, site."""
    urls = tomllib.loads(PYPROJECT.read_text())["project"].get("urls", {})
    config.site_url = urls.get("Documentation")
    if "Repository" in urls:
        config.repo_url, config.edit_uri = urls["Repository"], "edit/main/docs/"
        config.repo_name = config.repo_url.rpartition("/")[2]
    return config


def on_page_markdown(markdown, page, config, files):
    """Choose a picture by the page's own light, which need not be the browser's."""
    return PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", markdown)
