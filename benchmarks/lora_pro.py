"""A whole training step under LoraPro and under AdamW alone, over a model of SmolLM2-135M's shapes.

    python -m benchmarks.lora_pro [--rounds 7] [--tokens 160] [--iterations 16] [--seconds 90]

A step is zero_grad, forward and backward of batch 2 x TOKENS in float32 with all linear layers
adapted, and the optimizer's. "lora" is a pair of rank 8 with a fixed scale in each layer, "rasa" is
r = 8, k = 1, whose pools are solved by conjugate gradients, all ``iterations`` of them. A ratio is
that of the same adapter's medians. The weights are random, which does not change the time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

import rasa_ext
from benchmarks import baselines, harness
from benchmarks.model import base_model
from rasa_ext.optim import LoraPro

VARIANTS = tuple(
    f"{adapter} {optimizer}"
    for adapter in ("lora", "rasa")
    for optimizer in ("adamw", "factors", "full")
)

WARMUP = 2


def stepper(name: str, base, tokens: int, iterations: int, alone: list[float]):
    """One variant over the base's own weights: a callable that does one step.

    It appends to ``alone`` the seconds that the optimizer took of it.
    """
    adapter, kind = name.split()
    model = baselines.sharing_copy(base)
    baselines.lively(rasa_ext.patch_model(model, rank=8, k=1 if adapter == "rasa" else 0))
    if adapter == "lora":
        for key, parameter in model.named_parameters():
            if key.endswith(".d"):
                parameter.requires_grad_(False)
    options = {"lr": 1e-5, "weight_decay": 0.0}
    if kind == "adamw":
        optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), **options)
    else:
        options |= {"moments": kind, "iterations": iterations, "tolerance": 0.0}
        optimizer = LoraPro(model, torch.optim.AdamW, **options)
    model.train().get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())
    ids = torch.randint(0, 49152, (2, tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        value = loss.item()
        assert math.isfinite(value)
        start = time.perf_counter()
        optimizer.step()
        alone.append(time.perf_counter() - start)
        return value

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=90.0, help="no round begins after these")
    arguments = parser.parse_args()
    harness.pin_allocator()
    base, alone = base_model(torch.float32), {name: [] for name in VARIANTS}
    given = arguments.tokens, arguments.iterations
    steps = {name: stepper(name, base, *given, alone[name]) for name in VARIANTS}
    print(harness.machine())
    seconds = harness.interleaved(steps, arguments.rounds, WARMUP, at_most=arguments.seconds)
    print(f"{'variant':14} {'ms':>8} {'quartiles':>17} {'/adamw':>7} {'optimizer ms':>13}")
    for name in VARIANTS:
        low, middle, high = (1e3 * value for value in harness.quartiles(seconds[name]))
        floor = 1e3 * statistics.median(seconds[f"{name.split()[0]} adamw"])
        its = 1e3 * statistics.median(alone[name][WARMUP:])
        print(
            f"{name:14} {middle:8.1f} {f'{low:.1f} - {high:.1f}':>17} {middle / floor:7.3f} "
            f"{its:13.1f}"
        )
    print(f"{min(map(len, seconds.values()))} rounds")


if __name__ == "__main__":
    main()
