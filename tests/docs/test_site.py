"""Generated parts of the site are current and complete, and printed outputs are true."""

import importlib
import json
import re
import sys
from dataclasses import fields
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import generate
import notebook
import pytest
import run_page
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rasa_ext
from rasa_ext.commands.options import TASKS, BaseOptions, Data, short
from tests.helpers.pages import COMMANDS, PAGES, RESEARCH, ROOT, blocks
from tests.helpers.processes import run_whole

TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_what_is_generated_is_current():
    """The check runs in another process, because it registers the methods of research."""
    run_whole([sys.executable, ROOT / "docs" / "generate.py", "--check"])


def test_the_command_s_page_has_every_option():
    text = generate.options("rasa_ext")
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name, section in sections.items():
        shown = set(re.findall(r"^- `([^`]*)`", section, re.MULTILINE))
        if name not in TASKS:
            assert shown == {each.opts[0] for each in COMMANDS[name].params}
        elif name == "sft":
            own = {f"--{short(each.name)}" for each in (*fields(Data), *fields(BaseOptions))}
            assert {each.replace("_", "-") for each in own} <= shown
    ours = {n for n, each in COMMANDS.items() if each.callback.__module__.startswith("rasa_ext.")}
    assert set(sections) == ours - {"finetune"}


def test_the_python_pages_have_every_public_name():
    text = "".join((ROOT / "docs" / name).read_text() for name in ("api.md", "extending.md"))
    names = ("methods", "patching", "training", "checkpoint", "linalg")
    names += tuple(f"commands.{each}" for each in ("output", "data", "models", "parsing"))
    modules = {name: importlib.import_module(f"rasa_ext.{name}") for name in names}
    shown = set(re.findall(r"\brasa_ext\.([\w.]+\w)", text))
    inside = {f"{name}.{each}" for name, module in modules.items() for each in module.__all__}
    left_out = {f"methods.{name}" for name in ("RasaConfig", "read_method")}
    own = set(rasa_ext.__all__) - {"__version__", *modules}
    assert own | inside - left_out <= shown


def test_the_kernels_page_has_every_operator():
    names = map(str, torch._C._dispatch_get_all_op_names())
    ours = {name.partition("::")[2] for name in names if name.startswith("rasa_ext::")}
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert ours - set(re.findall(r"`(\w+)`", text)) == set()


def test_the_printed_summary_is_that_of_smollm2():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=49152, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    printed = str(rasa_ext.summary(rasa_ext.patch_model(model, rank=8, k=1)))
    assert f"```text\n{printed}\n```" in (ROOT / "docs" / "api.md").read_text()


def test_the_notebook_has_the_page_s_code_and_output():
    page = TUTORIAL.read_text()
    cells = json.loads(notebook.from_markdown(page))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    told = [
        text.rstrip("\n") if language == "python" else f"%%bash -e\n{text.rstrip()}"
        for language, text in blocks(TUTORIAL)
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
    done, output = run_page.run(page), re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
    (first, second, third) = output.findall(done)
    assert (first, third) == ("2\n", "3\n")
    assert re.fullmatch(r"a\n1\n2\n.*\n\.\.\.\n.*\n98\n99\n", second, re.DOTALL)
    assert output.sub("", done) == output.sub("", page)


class Links(HTMLParser):
    """What a built page leads to, and the anchors that it has."""

    def __init__(self, page):
        super().__init__()
        self.found, self.anchors = [], {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.found += [given[key] for key in ("src", "href", "srcset") if given.get(key)]


def test_every_picture_and_link_of_the_site_leads_somewhere(site):
    """mkdocs checks what is written in Markdown, not what hooks and HTML make."""
    built = {
        page.resolve(): Links(page) for page in site.rglob("*.html") if page.name != "404.html"
    }
    dead, pictures = [], 0
    for page, links in built.items():
        for link in map(urlsplit, links.found):
            if link.scheme or link.netloc:
                continue
            to = (page.parent / unquote(link.path)).resolve() if link.path else page
            to = to / "index.html" if to.is_dir() else to
            pictures += to.suffix in (".svg", ".png")
            if not to.is_file() or (to in built and link.fragment not in built[to].anchors):
                dead.append((page.relative_to(site), link.geturl()))
    assert dead == []
    assert pictures > 20


def test_the_site_shows_every_picture_as_it_is_lit(site):
    written = sum(page.read_text().count("<picture>") for page in (ROOT / "docs").rglob("*.md"))
    text = "".join(page.read_text() for page in site.rglob("*.html"))
    assert "<picture" not in text
    assert text.count("#only-light") == text.count("#only-dark") == written > 0


@pytest.mark.parametrize("page", PAGES + RESEARCH, ids=lambda page: page.name)
def test_code_fits_its_column(page):
    """Lines must have at most 100 characters, the width of the site's column on a wide screen."""
    for language, text in re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page.read_text(), re.M | re.S):
        for line in text.splitlines():
            assert len(line) <= 100 or language == "math", line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "research/README.md"])
def test_links_lead_somewhere(name):
    """Links outside the site must lead to files; mkdocs checks those of the site's pages."""
    page = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    links += re.findall(r'(?:src|srcset)="([^":]+)"', page.read_text())
    for link in links:
        assert (page.parent / link).is_file(), link
