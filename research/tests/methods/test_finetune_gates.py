"""finetune with gates: gates close, closed gates are pruned, wrong options are refused."""

from __future__ import annotations

import re

import pytest
import torch

import rasa_ext
from research.tests.methods.finetune_cases import GATED, SMALL
from tests.commands.test_finetune_methods import (  # noqa: F401 - tests, run here
    test_a_resumed_run_has_the_losses_of_an_uninterrupted_one,
    test_another_adapter_is_not_resumed,
    test_it_trains_what_the_method_trains,
)
from tests.helpers.cli import invoke
from tests.helpers.finetuning import KNOWN, check_refused, options_of, run
from tests.helpers.methods import rasa_linears
from tests.helpers.tiny_lm import make_model

KNOWN.update(GATED)


@pytest.fixture(params=GATED)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["gated-rasa", "sora"])
def resumed(request) -> str:
    return request.param


@pytest.fixture
def another() -> tuple:
    said = "gate_threshold (0.001 before, 0.002 now)"
    return "gated-rasa", {"gate_threshold": 2e-3}, said


def test_gates_close_and_are_pruned(name, common, tmp_path, capsys):
    """Pruning changes no output; the training has every rank and the pruned adapter fewer."""
    large = {"gate_threshold": 0.2 if name == "gated-rasa" else 0.4}
    whole = options_of(common, name, tmp_path / "whole", max_steps=6, **large)
    result, _ = run(whole)
    text = capsys.readouterr().out
    left, every = map(int, re.search(r"(\d+) of (\d+) gates are open\.", text).groups())
    assert left < every
    options = {**large, "prune": "true"}
    pruned = options_of(common, name, tmp_path / "pruned", max_steps=6, **options)
    run(pruned)
    text = capsys.readouterr().out
    after, before = map(int, re.search(r"rank is (\d+), from (\d+)", text).groups())
    assert after < before
    ids = torch.arange(1, 9).unsqueeze(0)
    models = [rasa_ext.load_adapter(make_model(), each["output"]) for each in (whole, pruned)]
    torch.testing.assert_close(*(model(ids).logits for model in models))
    ranks = [layer.effective_rank for layer in rasa_linears(models[1]).values()]
    assert max(ranks) == after
    assert result["trainable"] > rasa_ext.summary(models[1]).adapter
    run(pruned, resume=True)  # a finished run is pruned again
    assert f"rank is {after}, from {before}" in capsys.readouterr().out
    again = rasa_ext.load_adapter(make_model(), pruned["output"])
    assert torch.equal(again(ids).logits, models[1](ids).logits)


def test_closed_altogether(common, tmp_path, capsys):
    run(options_of(common, "sora", tmp_path, **{"gate_threshold": 100.0, "prune": "true"}))
    said = "0 of 56 gates are open; without the others the effective rank is 0, from 4."
    assert said in capsys.readouterr().out
    model = rasa_ext.load_adapter(make_model(), tmp_path).eval()
    ids = torch.arange(1, 9).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, make_model()(ids).logits)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "sora",
            {"gate_threshold": None},
            "gate_threshold: expected a number with the method 'sora'",
        ),
        (
            "sora",
            {"gate_threshold": None, "prune": "true"},
            "gate_threshold: expected a number with the method 'sora'",
        ),
        ("sora", {"gate_threshold": -1}, "gate_threshold: expected a finite number >= 0"),
        ("gated-rasa", {"k": 0}, "gates, from SoraConfig or from GatedRasaConfig with k > 0"),
        ("gated-rasa", {"experts": "slot"}, "gate_threshold: expected None with experts='slot'"),
        ("lora", SMALL, "gate_threshold: expected none with the method 'lora'"),
        ("rasa", SMALL, "gate_threshold: expected none with the method 'rasa'"),
        ("sora", {"train_A": "no"}, "train_A: expected none with the method 'sora'"),
    ],
)
def test_options_that_do_not_fit(name, changes, message, common, tmp_path, monkeypatch):
    """Wrong options raise before the base's weights are read."""
    monkeypatch.delattr("rasa_ext.commands.training.load_model")
    check_refused(common, name, changes, message, tmp_path / "out")


def test_by_the_command(common, tmp_path, capsys):
    words = [
        word for key, value in common.items() for word in (f"--{key.replace('_', '-')}", value)
    ]
    gates = ("--method", "sora", "--gate-threshold", 0.4, "--prune", "true")
    text = invoke("finetune", *words, *gates, "--output", tmp_path / "sora")
    assert "gates are open; without the others" in text
