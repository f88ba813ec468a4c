"""Tasks that train only a diagonal over fixed directions."""

from __future__ import annotations

import copy

import pytest
import torch

import rasa_ext
from rasa_ext.methods import LoraConfig
from rasa_research import training
from research.tests.methods import cases  # noqa: F401 - which makes them known
from tests.helpers.methods import base, case, inputs, rasa_linears


@pytest.mark.parametrize("name", ["rasa", "sora, pool", "gated-rasa, pruned"])
def test_a_second_task_trains_diagonals_alone_and_the_first_comes_back(name):
    model, x = case(name), inputs(20)
    y, first = model(x), training.diagonals(model)
    training.train_diagonals(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in rasa_ext.adapter_parameters(model) if p.requires_grad], lr=0.05
    )
    for _ in range(5):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert changed == {f"{path}.d" for path in rasa_linears(model)}
    second, after = training.diagonals(model), model(x)
    training.load_diagonals(model, first)
    assert torch.equal(model(x), y)
    training.load_diagonals(model, second)
    assert torch.equal(model(x), after)
    assert sum(d.numel() for d in second.values()) == sum(
        layer.effective_rank for layer in rasa_linears(model).values()
    )


@pytest.mark.parametrize("change", ["missing", "other", "shape", "list", "lists"])
def test_what_does_not_fit_is_refused_and_changes_nothing(change):
    model = case("rasa")
    task = {name: torch.zeros_like(d) for name, d in training.diagonals(model).items()}
    if change == "missing":
        task.popitem()
    elif change == "other":
        task["3.up_proj"] = torch.zeros(2)
    elif change == "shape":
        task["2.down_proj"] = torch.zeros(2)
    elif change == "list":
        task = list(task.values())
    else:
        task["2.down_proj"] = [0.0]
    before = model(inputs())
    with pytest.raises((TypeError, ValueError), match="task: expected"):
        training.load_diagonals(model, task)
    assert torch.equal(model(inputs()), before)


def test_methods_without_a_diagonal():
    model = rasa_ext.patch_model(base(), config=LoraConfig(2))
    for refused in (training.train_diagonals, training.diagonals):
        with pytest.raises(ValueError, match="LoraConfig"):
            refused(model)
    merged = case("rasa")
    task = training.diagonals(merged)
    rasa_ext.merge(merged)
    with pytest.raises(RuntimeError, match="unmerge"):
        training.load_diagonals(merged, task)
