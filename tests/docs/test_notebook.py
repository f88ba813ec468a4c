"""The demo's notebook runs in a Jupyter kernel, on a tiny model."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rasa_ext.commands.demo import FULL
from rasa_ext.commands.models import SMOLLM2
from tests.helpers.tiny_lm import save_base

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "demo.ipynb"
TINY = {"STEPS": 12, "BATCH_SIZE": 4, "LEARNING_RATE": 1e-2, "HELD_OUT": 8, "NEW_TOKENS": 4}


def parameters(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the cell with papermill's tag for parameters."""
    (cell,) = [each for each in book.cells if "parameters" in each.metadata.get("tags", ())]
    return cell


def execute(book: nbformat.NotebookNode, folder: Path) -> list[str]:
    """Run every cell in ``folder``, and return what each prints, including expected errors."""
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [cell.get("outputs", ()) for cell in book.cells]
    return ["".join(each.get("text", each.get("evalue", "")) for each in some) for some in outputs]


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Return the notebook with parameters for a tiny model and a few steps."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = save_base(tmp_path / "base")
    book = nbformat.read(NOTEBOOK, as_version=4)
    values = {"MODEL": str(base), **TINY}
    parameters(book).source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    return book


def test_the_notebook_runs_and_learns(book, tmp_path):
    """The notebook must run, and its last comparison must fail if the LoRA is unloaded."""
    *_, last = [cell.source for cell in book.cells if cell.cell_type == "code"]
    wrong = "lora = lora.unload()\n" + last[last.index("for name, other in") :]
    fails = {"tags": ["raises-exception"]}
    book.cells.append(nbformat.v4.new_code_cell(wrong, metadata=fails))
    *cells, error = execute(book, tmp_path)
    printed = "".join(cells)
    (before, after) = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)$", printed, re.M)[0])
    assert after < before - 0.1
    assert re.search(rf"^step {TINY['STEPS']}/{TINY['STEPS']}  loss", printed, re.M)
    change = float(re.search(r"by training: (\S+)", printed)[1])
    differences = dict(re.findall(r"^(.+): logits differ by (\S+)$", printed, re.M))
    rank = 8 - 1 + 2 * 1  # r - k + L*k with two layers
    assert set(differences) == {"merged model", f"LoRA of rank {rank}"}
    assert all(float(each) < 1e-3 * change for each in differences.values())
    assert f"the LoRA of rank {rank} is not what was trained" in error


def test_its_outputs_are_committed():
    """The page shows them; a cell without a call of print has none."""
    cells = [each for each in nbformat.read(NOTEBOOK, as_version=4).cells if "outputs" in each]
    assert [bool(each.outputs) for each in cells] == ["print(" in each.source for each in cells]
    printed = "".join(output.text for each in cells for output in each.outputs)
    before, after = map(int, re.findall(r"^exact match (\d+)% -> (\d+)%", printed, re.M)[0])
    assert after > before


def test_its_parameters_are_the_demo_s():
    cell = parameters(nbformat.read(NOTEBOOK, as_version=4))
    names: dict[str, object] = {}
    exec(cell.source, names)
    del names["__builtins__"]
    assert names == {
        "MODEL": SMOLLM2,
        "STEPS": FULL.steps,
        "BATCH_SIZE": FULL.batch_size,
        "LEARNING_RATE": FULL.lr,
        "HELD_OUT": FULL.held_out,
        "NEW_TOKENS": FULL.max_new_tokens,
    }
