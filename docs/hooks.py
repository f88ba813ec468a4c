"""What mkdocs adds while it builds the site: pictures, a notebook, tables of fields and options.

Nothing here imports torch: configs are read as text, and the command through its own modules.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import command_reference  # noqa: E402
import config_fields  # noqa: E402
import notebook  # noqa: E402
import pictures  # noqa: E402
import repository  # noqa: E402

GENERATED = {
    "<!-- fields of RasaConfig -->": config_fields.rasa_table,
    "<!-- fields of peft.RasaConfig -->": config_fields.peft_table,
    "<!-- options of the command -->": command_reference.markdown,
} | {
    f"<!-- fields of {name} -->": functools.partial(config_fields.method_table, name)
    for name in config_fields.METHODS
}
PICTURE = re.compile(r"!\[([^]]*)\]\(pictures/(\w+)\.svg\)")


def on_config(config):
    """Link to the repository that this checkout was cloned from, unless mkdocs.yml names one."""
    config.repo_url = config.repo_url or repository.web_address(repository.origin())
    if config.repo_url:
        config.repo_name = config.repo_name or config.repo_url.rpartition("/")[2]
    return config


def on_files(files, config):
    """Draw every picture into ``pictures/`` of the site; add the notebooks of tutorial and demo."""
    made = {f"pictures/{name}.svg": svg for name, svg in pictures.draw_all().items()}
    made["tutorial.ipynb"] = notebook.from_markdown((HERE / "tutorial.md").read_text())
    made["demo.ipynb"] = (HERE.parent / "examples" / "demo.ipynb").read_text()
    for path, content in made.items():
        if committed := files.get_file_from_path(path):
            files.remove(committed)
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in what is generated, where a page has its mark; show pictures as the page is lit."""
    for mark, make in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    both = r"![\1](pictures/\2.svg#only-light)![\1](pictures/\2-dark.svg#only-dark)"
    return PICTURE.sub(both, markdown)
