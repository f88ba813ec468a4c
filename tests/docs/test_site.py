"""The site's generated parts: options, fields, the notebook, what examples print, pictures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rasa_ext
import rasa_ext.peft
from tests.docs.test_docs import COMMANDS, PAGES, RESEARCH, ROOT, blocks

import command_reference  # isort: skip
import config_fields  # isort: skip
import notebook  # isort: skip
import pictures  # isort: skip
import repository  # isort: skip
import run_page  # isort: skip

TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_the_reference_has_every_command_and_option():
    text = command_reference.markdown()
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMANDS)
    for name, command in COMMANDS.items():
        shown = set(re.findall(r"`[^`]*`", sections[name]))
        for parameter in command.params:
            if not parameter.hidden:
                option = parameter.opts[-1]
                assert any(re.search(rf"{option}\b", each) for each in shown), (name, option)


@pytest.mark.parametrize(
    "module", ["command_reference", "config_fields", "notebook", "pictures", "repository"]
)
def test_the_site_is_built_without_torch(module):
    program = (
        "import sys\nsys.modules['torch'] = None\n"
        f"import {module}\n"
        "if hasattr(module := sys.modules[sys.argv[1]], 'markdown'):\n    module.markdown()\n"
    )
    run = [sys.executable, "-c", program, module]
    done = subprocess.run(run, cwd=ROOT / "docs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("read", "config"),
    [
        (config_fields.rasa_fields, rasa_ext.RasaConfig),
        (config_fields.peft_fields, rasa_ext.peft.RasaConfig),
        *(
            (lambda name=name: method_fields(name), getattr(rasa_ext.methods, name))
            for name in config_fields.METHODS.keys() & set(rasa_ext.methods.__all__)
        ),
    ],
)
def test_fields_are_those_of_the_config(read, config):
    check_fields(read, config)


def method_fields(name: str) -> list[config_fields.Field]:
    own = config_fields.fields(config_fields.METHODS[name], name)
    return own + config_fields.fields("methods/base.py", "AdapterConfig")


def check_fields(read, config) -> None:
    ours = [each for each in config.__mro__ if each.__module__.startswith("rasa_")]
    names = {name for each in ours for name in each.__annotations__}
    real = {f.name: f for f in dataclasses.fields(config) if f.name in names}
    found = {field.name: field for field in read()}
    assert set(found) == set(real)
    for name, field in found.items():
        told = (repr(real[name].default), real[name].metadata["help"])
        assert (field.default, field.help) == told


def test_the_python_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    names = ("methods", "patching", "training", "checkpoint", "linalg")
    names += tuple(f"commands.{each}" for each in ("output", "data", "models", "parsing"))
    modules = {name: importlib.import_module(f"rasa_ext.{name}") for name in names}
    shown = {
        name
        for name in re.findall(r"^::: rasa_ext\.([\w.]+)", text, re.MULTILINE)
        if "." not in name or name.rpartition(".")[0] in modules
    }
    inside = {f"{name}.{each}" for name, module in modules.items() for each in module.__all__}
    left_out = {f"methods.{name}" for name in ("RasaConfig", "read_method")}
    expected = {*rasa_ext.__all__, "analysis"} - {"__version__", *modules}
    assert shown == expected | (inside - left_out)


def test_the_kernels_page_has_every_operator():
    names = map(str, torch._C._dispatch_get_all_op_names())
    ours = {name.partition("::")[2] for name in names if name.startswith("rasa_ext::")}
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert ours - set(re.findall(r"`(\w+)`", text)) == set()


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_printed_summary_is_that_of_smollm2(page):
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    printed = str(rasa_ext.summary(rasa_ext.patch_model(model, rank=8, k=1)))
    assert f"```text\n{printed}\n```" in (ROOT / page).read_text()


def test_the_notebook_has_the_page_s_code_and_output():
    page = TUTORIAL.read_text()
    cells = json.loads(notebook.from_markdown(page))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    told = [
        text.rstrip("\n") if language == "python" else f"%%bash -e\n{text.rstrip()}"
        for language, text, _ in blocks(TUTORIAL)
    ]
    assert code == told
    assert len({cell["id"] for cell in cells}) == len(cells)
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert ".md)" in page
    assert ".md)" not in prose
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert len(outputs) == page.count("\n```text\n") > 0


def test_a_page_is_given_its_output():
    page = (
        "```python\nx = 2\nprint(x)\n```\n\n```text\nold\n```\n\n"
        "```bash\necho a; seq 99\n```\n\n```text\n```\n\n"
        "```python\nx += 1\n```\n\n```python\nprint(x)\n```\n\n```text\n```\n\n"
        "```bash\npip install nothing\n```\n"
    )
    done = run_page.run(page)
    (first, second, third) = re.findall(r"^```text\n(.*?)^```", done, re.MULTILINE | re.DOTALL)
    assert (first, third) == ("2\n", "3\n")
    assert second.startswith("a\n1\n2\n")
    assert "\n...\n" in second
    assert second.endswith("\n98\n99\n")
    assert re.sub(r"```text\n.*?```", "", done, flags=re.DOTALL) == re.sub(
        r"```text\n.*?```", "", page, flags=re.DOTALL
    )


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://host.org/someone/rasa_ext.git", "https://host.org/someone/rasa_ext"),
        ("https://token@host.org/someone/rasa_ext", "https://host.org/someone/rasa_ext"),
        ("git@host.org:someone/rasa_ext.git", "https://host.org/someone/rasa_ext"),
        ("ssh://git@host.org/someone/rasa_ext.git", "https://host.org/someone/rasa_ext"),
        ("/srv/rasa_ext.git", None),
        ("", None),
    ],
)
def test_the_link_to_the_repository(remote, page):
    assert repository.web_address(remote) == page


def test_the_readme_s_pictures_are_those_that_are_drawn():
    """By what is written in them: matplotlib's releases place a line a little differently."""
    drawn = pictures.draw_all()
    for name in pictures.README:
        committed = (pictures.FOLDER / f"{name}.svg").read_text()
        assert words(committed) == words(drawn[name]) != []
    assert words(drawn["pool"]) == words(drawn["pool-dark"])


def words(svg: str) -> list[str]:
    return re.findall(r"<!--(.*?)-->", svg, re.DOTALL)


@pytest.mark.parametrize("page", PAGES + RESEARCH, ids=lambda page: page.name)
def test_code_fits_its_column(page):
    """A line of 100 characters is what the site's column holds on a wide screen."""
    for language, text in re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page.read_text(), re.M | re.S):
        for line in text.splitlines():
            assert len(line) <= 100 or language == "math", line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "research/README.md"])
def test_links_lead_somewhere(name):
    """Those of the site's pages are checked as it is built."""
    page = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    links += re.findall(r'(?:src|srcset)="([^":]+)"', page.read_text())
    for link in links:
        assert (page.parent / link).is_file(), link


def test_the_citation_has_the_package_s_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {rasa_ext.__version__}\n" in text
