"""The package's imports and metadata."""

import email
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import hooks
import pytest

import rasa_ext

ROOT = Path(__file__).resolve().parents[2]

OPTIONAL = (
    *("accelerate", "bitsandbytes", "gguf", "matplotlib", "peft", "rich", "torchao", "trl"),
    *("transformers", "typer", "yaml", "rasa_ext.commands", "rasa_ext.peft"),
    "huggingface_hub",
)


def test_the_library_imports_only_torch_safetensors_and_regex():
    """Neither importing nor patching and merging may import optional packages."""
    program = (
        "import sys, torch, rasa_ext, rasa_ext.nn.functional, rasa_ext.ops; from torch import nn\n"
        "rasa_ext.merge_and_unload(rasa_ext.patch_model(nn.Sequential(nn.Linear(4, 4)), 2, k=0))\n"
        f"print(*(name for name in {OPTIONAL!r} if name in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", ["rasa_ext", "rasa_ext.commands.app"])
def test_help_and_checks_of_options_need_no_torch(module):
    program = f"import sys, {module}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["False"], run.stderr


@pytest.mark.parametrize("repository", [None, "https://host.invalid/someone/rasa_ext"])
def test_a_package_page_has_no_dead_link(tmp_path, monkeypatch, repository):
    """All links must be absolute, with and without the repository's address in pyproject.toml.

    The site must use the address too.
    """
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "rasa_ext/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "build_support", tmp_path / "build_support")
    if repository:
        with (tmp_path / "pyproject.toml").open("a") as file:
            file.write(f'\n[project.urls]\nRepository = "{repository}"\n')
    program = "import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    (found,) = tmp_path.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(found.read_text())
    assert metadata.get_all("Project-URL") == (repository and [f"Repository, {repository}"])
    monkeypatch.setattr(hooks, "PYPROJECT", tmp_path / "pyproject.toml")
    site = hooks.on_config(types.SimpleNamespace(repo_url=None))
    assert (site.repo_url, site.site_url) == (repository, None)
    text = metadata.get_payload()
    links = re.findall(r'(?:\]\(|src="|srcset=")([^)"]*)', text)
    assert all(link.startswith("https://") for link in links)
    version = rasa_ext.__version__
    for kind, path in (("blob", "docs/install.md"), ("raw", "docs/pictures/pool.svg")):
        assert (f"{repository}/{kind}/v{version}/{path}" in links) == bool(repository)
        assert (ROOT / path).is_file()
