"""Two processes that split a base by transformers' tp_plan train like one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rasa_ext
from tests.helpers.adapters import randomize
from tests.helpers.models import LLAMA
from tests.helpers.processes import torchrun
from tests.workers import split

PARITY = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(scope="module")
def halves(tmp_path_factory, forked_python) -> Path:
    """torchrun's output: one directory for each case."""
    directory = tmp_path_factory.mktemp("halves")
    for case in split.CASES:
        split.whole(case).save_pretrained(directory / f"base-{case}")
    model = split.adapted(split.whole("biased"))
    randomize(model, 7)
    rasa_ext.save_adapter(model, directory / "start")
    torchrun(forked_python, "split.py", directory)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("case", split.ENGINES)
def test_two_processes_train_as_one(case, halves, tmp_path, figure):
    model = split.adapted(split.whole(case if case in split.CASES else "biased"))
    randomize(model, 3)
    one, two = split.train(model), torch.load(halves / case / "steps.pt")
    rasa_ext.save_adapter(model, tmp_path)
    here, there = tensors(tmp_path), tensors(halves / case)
    assert one.keys() == two.keys()
    assert here.keys() == there.keys()

    def apart(key: str) -> float:
        """Return the largest difference relative to the largest value."""
        return ((one[key] - two[key]).abs().max() / one[key].abs().max()).item()

    losses, norms = apart("losses"), apart("norms")
    gradients = max(map(apart, one.keys() - {"losses", "norms"}))
    adapters = max((here[key] - there[key]).abs().max().item() for key in here)
    figure(
        f"tensor parallelism, {case}: two processes differ by {losses:.1e} (losses), "
        f"{adapters:.1e} (adapter), {norms:.1e} (gradient norms, relative), {gradients:.1e} "
        "(first gradients, relative)"
    )
    assert one["losses"][0] > one["losses"][-1]
    assert one["norms"].max() > split.CLIP
    parity = PARITY[model.dtype]
    assert max(losses, norms) <= parity
    assert gradients <= 5 * parity
    assert adapters <= {torch.float64: 1e-9, torch.float32: 1e-5}[model.dtype]


def test_an_adapter_from_one_process_over_a_split_base(halves, figure):
    start, again = tensors(halves / "start"), tensors(halves / "again")
    assert start.keys() == again.keys()
    assert all(torch.equal(start[key], again[key]) for key in start)
    model = rasa_ext.load_adapter(split.whole("biased"), halves / "start").eval()
    with torch.no_grad():
        logits = model(**LLAMA.inputs(0)).logits
    apart = max((each - logits).abs().max().item() for each in torch.load(halves / "logits.pt"))
    figure(f"tensor parallelism, loaded: logits of two processes differ by {apart:.1e}")
    assert apart <= PARITY[model.dtype]


def test_a_model_of_peft(halves, figure):
    one = split.step_of_peft(split.whole("biased"))
    two = torch.load(halves / "peft.pt")
    assert one.keys() == two.keys()
    apart = max(((one[k] - two[k]).abs().max() / one[k].abs().max()).item() for k in one)
    figure(f"tensor parallelism, PEFT: two processes differ by {apart:.1e} (logits, gradients)")
    assert apart <= PARITY[torch.float32]  # float32, the adapter's dtype; the base is float64


def test_what_is_refused(halves):
    said = json.loads((halves / "refused.json").read_text())
    wanted = {
        "head": ("ValueError: target_modules: 'lm_head'", "ColwiseParallel", "exclude_modules"),
        "merge": ("ValueError: model: expected whole base weights", "q_proj"),
    }
    assert said.keys() == wanted.keys()
    for name, words in wanted.items():
        assert all(word in said[name] for word in words), said[name]
