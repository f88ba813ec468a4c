"""Fixtures that run pages, also for the pages of research; docs/ is importable."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from tests.helpers import lora_server, pages

sys.path.insert(0, str(pages.ROOT / "docs"))
SERVER = "http://localhost:8000"
"""Address of the LoRA server on pages that send requests to one."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Return a folder with the hub cache that pages read, and ``smollm2``."""
    folder = tmp_path_factory.mktemp("models")
    pages.save_models(folder)
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Return the folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=pages.ROOT, env=quiet, check=True, capture_output=True)
    return folder


@pytest.fixture
def run_page(models, tmp_path, monkeypatch, forked_python):
    """Return a function that runs a page in a fresh folder and returns the outputs that differ."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "hub"))
    pages.write_programs(tmp_path / "bin", forked_python)
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "examples").symlink_to(pages.ROOT / "examples")
    monkeypatch.chdir(folder)
    for path in (models, folder):
        monkeypatch.syspath_prepend(path)

    def run(page: Path) -> list[str]:
        run = functools.partial(pages.run, page, tmp_path / "bin", models)
        if SERVER not in page.read_text():
            return run()
        base = AutoModelForCausalLM.from_pretrained(pages.HUB_NAME)
        with lora_server.serving(base) as running:
            return run((SERVER, running.address))

    return run
