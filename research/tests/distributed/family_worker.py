"""Run tests/workers/family.py over the methods of this package.

torchrun --nproc-per-node 2 research/tests/distributed/family_worker.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import rasa_ext
from rasa_ext.methods import AdapterConfig
from rasa_research import methods, training
from research.tests.methods.cases import CASES
from tests.helpers.methods import WIDE, base
from tests.workers.family import Change, Family, main

SD_LORA = methods.SdLoraConfig(3, **WIDE)
LORA = methods.BoostedLoraConfig(**WIDE)
POOL = methods.BoostedPoolConfig(**WIDE)
SORA = methods.SoraConfig(4, 1, 8.0, **WIDE)
TRAINED_ON = methods.BoostedPoolConfig(train_past=True, **WIDE)


def boosters(config: AdapterConfig) -> Change:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> training.Boosting:
        return training.Boosting(model, optimizer, 2, seed=3)

    return Change(config, [], steps)


def patched(config: AdapterConfig) -> nn.Module:
    return rasa_ext.patch_model(base(), config=config)


def third_task() -> nn.Module:
    return training.next_task(training.next_task(patched(SD_LORA)))


def boost(model: nn.Module, layers: int | None = None) -> None:
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
    training.Boosting(model, optimizer, 1, layers).step()


FAMILY = Family(
    list(CASES),
    {
        "tasks": Change(
            SD_LORA,
            [training.next_task, training.next_task, lambda model: training.absorb(model, 1.0)],
        ),
        "prune": Change(
            SORA, [training.prune] * 2, lambda model, _: training.ProximalGates(model, 0.05)
        ),
        "boosters": boosters(LORA),
        "pool": boosters(POOL),
    },
    {
        "next_task": (lambda: patched(SD_LORA), training.next_task),
        "absorb": (third_task, training.absorb),
        "prune": (lambda: patched(SORA), training.prune),
        "layers": (lambda: patched(LORA), lambda model: boost(model, 2)),
        "train_past": (lambda: patched(TRAINED_ON), boost),
    },
)

if __name__ == "__main__":
    main(FAMILY)
