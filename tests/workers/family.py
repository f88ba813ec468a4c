"""Training every method over a small model, in one process or in several on parts of one batch.

torchrun --nproc-per-node 2 tests/workers/family.py DIRECTORY leaves DIRECTORY/outputs.pt, and what
``refused`` says in DIRECTORY/refused.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from rasa_ext import methods, training
from tests.helpers.methods import CASES, WIDE, base, case, inputs

SORA = methods.SoraConfig(4, 8.0, 1, **WIDE)
SD_LORA = methods.SdLoraConfig(3, **WIDE)
LORA = methods.LoraConfig(1, 1.0, **WIDE)
POOL = methods.BoostedPoolConfig(**WIDE)
TRAINED_ON = methods.BoostedPoolConfig(train_past=True, **WIDE)
Change = Callable[[nn.Module], object]
CHANGES: dict[str, tuple[methods.AdapterConfig, list[Change]]] = {
    "prune": (SORA, [training.prune, training.prune]),
    "tasks": (
        SD_LORA,
        [training.next_task, training.next_task, lambda model: training.absorb(model, 1.0)],
    ),
}
"""What a step between trainings changes of an adapter."""
BOOSTERS: dict[str, tuple[methods.AdapterConfig, int | None]] = {
    "boosters": (LORA, None),
    "boosters, drawn": (LORA, 2),
    "pool": (POOL, None),
    "pool, drawn": (POOL, 2),
    "pool, trained on": (TRAINED_ON, None),
}
"""Configs, and how many layers a booster has."""
DDP = ["prune", "tasks", "boosters", "pool"]


def train(model: nn.Module) -> Tensor:
    """The outputs after five steps."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x = inputs(20)
    trained = [p for p in rasa_ext.adapter_parameters(model) if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    for step in range(5):
        rows = x.roll(step, 0)[rank::size]
        (wrapped(rows) - rows.flip(1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)  # drawn adapters are steep
        optimizer.step()
        optimizer.zero_grad()
    return model(x).detach()


def change(name: str, how: str) -> Tensor:
    """The outputs after steps that change the adapter, of processes whose generators differ."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    changes: list[Change | None]
    if name in BOOSTERS:
        (config, layers), changes = BOOSTERS[name], [None]
    else:
        (config, changes), layers = CHANGES[name], None
        changes = [*changes, None]
    model, x = rasa_ext.patch_model(base(), config=config), inputs(20)
    torch.manual_seed(rank)
    if how == "shard":
        rasa_ext.distributed.shard_model(model, init_device_mesh("cpu", (size,)))
    for act in changes:
        wrapped = DistributedDataParallel(model) if how == "ddp" else model
        optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
        steps = []
        if name in BOOSTERS:
            steps.append(training.Boosting(model, optimizer, 2, layers, seed=3))
        elif config is SORA:
            steps.append(training.ProximalGates(model, 0.05))
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
        assert all(torch.equal(each, mine) for each in everybody), f"{name}, {how}"
    return model(x).detach()


def refused() -> dict[str, str]:
    """What is said of steps that DistributedDataParallel cannot follow; models stay as they are."""
    said: dict[str, str] = {}

    def attempt(name: str, config: methods.AdapterConfig, call: Change) -> None:
        model = rasa_ext.patch_model(base(), config=config)
        before = [(n, p, p.detach().clone()) for n, p in model.named_parameters()]
        try:
            call(DistributedDataParallel(model))
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        for (n, p), (name_before, q, values) in zip(model.named_parameters(), before, strict=True):
            assert n == name_before
            assert p is q
            assert torch.equal(p, values)

    def boost(model: nn.Module, layers: int | None = None) -> None:
        optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
        training.Boosting(model, optimizer, 1, layers).step()

    attempt("prune", SORA, training.prune)
    attempt("next_task", SD_LORA, training.next_task)
    attempt("absorb", SD_LORA, training.absorb)
    attempt("layers", LORA, lambda model: boost(model, 2))
    attempt("train_past", TRAINED_ON, boost)
    return said


def main() -> None:
    torch.set_num_threads(1)
    models = {name: case(name) for name in CASES}
    dist.init_process_group("gloo")
    outputs = {name: train(model) for name, model in models.items()}
    outputs |= {f"{name}, ddp": change(name, "ddp") for name in DDP}
    outputs |= {f"{name}, shard": change(name, "shard") for name in [*CHANGES, *BOOSTERS]}
    said = refused()
    if dist.get_rank() == 0:
        directory = Path(sys.argv[1])
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(outputs, directory / "outputs.pt")
        (directory / "refused.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
