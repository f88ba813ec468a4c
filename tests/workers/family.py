"""Train every method over a small model, in one process or in several on parts of one batch.

torchrun --nproc-per-node 2 tests/workers/family.py DIRECTORY writes DIRECTORY/outputs.pt, and the
errors from ``refused`` to DIRECTORY/refused.json.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from rasa_ext import methods, training
from tests.helpers.methods import CASES, WIDE, base, case, inputs
from tests.helpers.processes import refuse_views

Act = Callable[[nn.Module], object]


class Change(NamedTuple):
    """Functions that change an adapter between trainings and after optimizer steps."""

    config: methods.AdapterConfig
    acts: list[Act]
    """Functions to call after each training but the last."""
    steps: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None
    """Makes an object with a ``step()`` that is called after the optimizer's."""


class Family(NamedTuple):
    """The cases that a worker runs."""

    cases: list[str]
    changes: dict[str, Change]
    refused: dict[str, tuple[Callable[[], nn.Module], Act]]
    """Models, and functions that must raise for the model in DistributedDataParallel."""


LORA = methods.LoraConfig(2, 4.0, **WIDE)


def grow(model: nn.Module) -> None:
    """Replace the adapter by a new one with one more rank."""
    config, layers = training.adapter_of(model, methods.LoraConfig)
    later = dataclasses.replace(config, rank=config.rank + 1)
    drawn = {layer: later.layer_tensors(layer.spec) for layer in layers.values()}
    training.replace_tensors(model, later, drawn)


# tests/methods/test_steps.py has what DistributedDataParallel cannot follow.
FAMILY = Family(list(CASES), {"grow": Change(LORA, [grow, grow])}, refused={})


def train(model: nn.Module) -> Tensor:
    """Train for five steps and return the outputs."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x = inputs(20)
    trained = [p for p in rasa_ext.adapter_parameters(model) if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    for step in range(5):
        rows = x.roll(step, 0)[rank::size]
        (wrapped(rows) - rows.flip(1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)  # random adapters have large gradients
        optimizer.step()
        optimizer.zero_grad()
    return model(x).detach()


def change(given: Change, how: str) -> Tensor:
    """Train with changes of the adapter, and return the outputs.

    Processes have different random seeds, but must end with equal adapters.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, x = rasa_ext.patch_model(base(), config=given.config), inputs(20)
    torch.manual_seed(rank)
    for act in (*given.acts, None):
        wrapped = DistributedDataParallel(model) if how == "ddp" else model
        optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
        steps = [] if given.steps is None else [given.steps(model, optimizer)]
        for step in range(7):
            rows = x.roll(step, 0)[rank::size]
            (wrapped(rows) - rows.flip(1)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(rasa_ext.adapter_parameters(model), 0.5)
            optimizer.step()
            for each in steps:
                each.step()
            optimizer.zero_grad()
        if act is not None:
            act(model)
    if size > 1:
        mine = torch.cat([p.detach().flatten() for p in rasa_ext.adapter_parameters(model)])
        everybody = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(everybody, mine)
        assert all(torch.equal(each, mine) for each in everybody), f"{given}, {how}"
    return model(x).detach()


def refused(family: Family) -> dict[str, str]:
    """Return errors of calls that do not work under DistributedDataParallel.

    The models must be unchanged afterwards.
    """
    said: dict[str, str] = {}
    for name, (make, call) in family.refused.items():
        model = make()
        before = [(n, p, p.detach().clone()) for n, p in model.named_parameters()]
        try:
            call(DistributedDataParallel(model))
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        for (n, p), (name_before, q, values) in zip(model.named_parameters(), before, strict=True):
            assert n == name_before
            assert p is q
            assert torch.equal(p, values)
    return said


def main(family: Family) -> None:
    torch.set_num_threads(1)
    models = {name: case(name) for name in family.cases}
    dist.init_process_group("gloo")
    refuse_views()
    outputs = {name: train(model) for name, model in models.items()}
    for name, each in family.changes.items():
        outputs[f"{name}, ddp"] = change(each, "ddp")
    said = refused(family)
    if dist.get_rank() == 0:
        directory = Path(sys.argv[1])
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(outputs, directory / "outputs.pt")
        (directory / "refused.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(FAMILY)
