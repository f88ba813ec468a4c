"""Time what LoraPro adds to a training step, on a model with SmolLM2-135M's shapes.

    python -m research.benchmarks.lora_pro [--rounds 9] [--tokens 160] [--iterations 16]

The benchmark times forward and backward of batch 2 x TOKENS in float32, with all linear layers
adapted, and each optimizer's step on the gradients of one such pass. A ratio compares pass plus
step with pass plus AdamW step, for the same adapter in the same run. "lora" is LoraConfig(rank=8),
with pairs that are solved in closed form. "rasa" has r = 8 and k = 1, with pools that are solved by
ITERATIONS conjugate gradient iterations. The weights are random, which does not change the time.
The table in docs/research/lora-pro.md is from an earlier version, in which "lora" was RaSA with
k = 0 and a frozen d.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import rasa_ext
from benchmarks import baselines, harness
from benchmarks.model import base_model, stepper
from rasa_ext.methods import LoraConfig, RasaConfig
from rasa_research.optim import LoraPro

OPTIMIZERS = ("adamw", "factors", "full")


def build(adapter: str, base):
    """Patch a copy of the model that shares the base's weights."""
    config = LoraConfig(rank=8) if adapter == "lora" else RasaConfig(rank=8, k=1)
    model = rasa_ext.patch_model(baselines.sharing_copy(base), config=config)
    return baselines.lively(model).train()


def optimizer_step(kind: str, model, iterations: int, seconds: list[float]) -> Callable[[], None]:
    """Return a step on the model's current gradients, which appends its time to ``seconds``."""
    trained = rasa_ext.adapter_parameters(model)
    gradients = [parameter.grad.clone() for parameter in trained]
    options = {"lr": 1e-6, "weight_decay": 0.0}
    if kind == "adamw":
        optimizer = torch.optim.AdamW(trained, **options)
    else:
        options |= {"moments": kind, "iterations": iterations, "tolerance": 0.0}
        optimizer = LoraPro(model, torch.optim.AdamW, **options)

    def step() -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient.clone()  # LoraPro overwrites it
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=80.0, help="no new round after this time")
    arguments = parser.parse_args()
    harness.pin_allocator()
    base = base_model(torch.float32)
    ids = torch.randint(0, 49152, (2, arguments.tokens), generator=torch.Generator().manual_seed(1))
    calls, alone = {}, {}
    for adapter in ("lora", "rasa"):
        model = build(adapter, base)
        calls[adapter] = stepper(model, ids)
        calls[adapter]()
        for kind in OPTIMIZERS:
            alone[adapter, kind] = []
            given = arguments.iterations, alone[adapter, kind]
            calls[f"{adapter} {kind}"] = optimizer_step(kind, model, *given)
    print(harness.machine())
    passes = harness.interleaved(calls, arguments.rounds, 2, at_most=arguments.seconds)
    print(f"{'':14} {'ms':>8} {'quartiles':>17} {'step / adamw':>13}")
    rounds = len(passes["lora"])
    for adapter in ("lora", "rasa"):
        row(f"{adapter} passes", passes[adapter])
        floor = statistics.median(passes[adapter])
        adamw = floor + statistics.median(alone[adapter, "adamw"][-rounds:])
        for kind in OPTIMIZERS:
            its = alone[adapter, kind][-rounds:]
            row(f"{adapter} {kind}", its, f"{(floor + statistics.median(its)) / adamw:13.3f}")
    print(f"{rounds} rounds")


def row(name: str, seconds: list[float], ratio: str = "") -> None:
    low, middle, high = (1e3 * value for value in harness.quartiles(seconds))
    print(f"{name:14} {middle:8.1f} {f'{low:.1f} - {high:.1f}':>17} {ratio}")


if __name__ == "__main__":
    main()
