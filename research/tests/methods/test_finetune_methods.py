"""finetune with every method of this package: the core's tests and some more."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rasa_ext.methods import every_method
from rasa_research import methods
from research.tests.methods.finetune_cases import GATED
from tests.commands.test_finetune_methods import (  # noqa: F401 - tests, run here
    test_a_resumed_run_has_the_losses_of_an_uninterrupted_one,
    test_another_adapter_is_not_resumed,
    test_it_trains_what_the_method_trains,
)
from tests.helpers.finetuning import KNOWN, check_refused, options_of, run

CASES = {
    "block-lora": ({"blocks": 4}, methods.BlockLoraConfig(4, 8.0, 4)),
    "sbora": ({"seed": 3}, methods.SboraConfig(4, 8.0, seed=3)),
    "sbora, side": ({"side": "B"}, methods.SboraConfig(4, 8.0, side="B")),
    "reslora": ({"window": 0}, methods.ResLoraConfig(4, 8.0, 0)),
    "sd-lora": ({}, methods.SdLoraConfig(4, 8.0)),
}
KNOWN.update(CASES)


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["block-lora", "sbora", "reslora"])
def resumed(request) -> str:
    return request.param


@pytest.fixture
def another() -> tuple:
    said = "window (0 before, 1 now)"
    return "reslora", {"window": 1}, said


def test_every_method_of_one_run_is_there():
    """Every method has a case here, except methods that need a loop of the user's."""
    ours = {n: c for n, c in every_method().items() if c.__module__.startswith("rasa_research.")}
    trained = {name for name, each in ours.items() if not each.loop}
    assert trained == {name.partition(",")[0] for name in (*CASES, *GATED)}
    assert ours.keys() - trained == {"boosted-lora", "boosted-pool"}


def test_rates_are_the_method_s(common, tmp_path):
    """Block-LoRA with one block is a LoRA; with n blocks, B moves n times as fast."""
    stored = {}
    for name, changes in (
        ("lora", {}),
        ("block-lora", {"blocks": 1}),
        ("block-lora", {**{"blocks": 2}, "rank": 8}),
    ):
        output = tmp_path / f"{name}{changes}"
        options = options_of(common, name, output, max_steps=1, **{"rank": 4, **changes})
        run(options, alpha=2.0 * options["rank"])
        stored[output.name] = load_file(output / "adapter_model.safetensors")
    lora, one, two = stored.values()
    for key, tensor in lora.items():
        assert torch.equal(one[key], tensor)
        if key.endswith("_B"):  # Adam's first step is the gradient's sign
            moved = tensor.abs() > 1e-4
            torch.testing.assert_close(two[key][moved], 2 * tensor[moved], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "lora",
            {"method": "boosted-pool"},
            "your own loop with rasa_research.training.Boosting",
        ),
        ("block-lora", {"blocks": 3}, "blocks: expected a divisor of the rank, which is 4"),
        ("reslora", {"side": "A"}, "side: expected none with the method 'reslora'"),
        ("sbora", {"side": "C"}, "side: expected 'A' or 'B', got 'C'"),
        ("sbora", {"rank": 40}, "rank: expected at most the 32 inputs"),
        ("sd-lora", {"window": 1}, "window: expected none with the method 'sd-lora'"),
        ("reslora", {"window": -1}, "window: expected an integer >= 0, got -1"),
    ],
)
def test_options_that_do_not_fit(name, changes, message, common, tmp_path):
    check_refused(common, name, changes, message, tmp_path / "out")
