"""Host time of a linear and training step: Python, autograd and dispatch, without any product.

    python -m benchmarks.host [--rounds 300] [--json FILE] [--seconds S]

Stubs that return uninitialised results replace the operators. A chain of layers, which form one
group, is measured at two lengths. The slope between them is the time of one layer: its linear, and
its part in packing the group and in the packs' backward. The time without layers is what a group
does once per step; each of 32 layers has a 32nd of it. ``fused`` is one more linear among those
that read one input. A GPU with little to do waits for this host time. It does not include the time
of the compiled operators and the launches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import rasa_ext
from benchmarks import harness, records
from rasa_ext import ops

WIDTH, LENGTHS, LAYERS = 64, (4, 20), 32
NAMES = ("q_proj", "k_proj", "v_proj")


def _forward(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty((len(x), WIDTH)), x.new_empty((len(x), 16))


def _backward(grad: Tensor, x: Any, weight: Any, U: Any, *packs: Any) -> tuple[Tensor, ...]:
    return grad.new_empty((len(grad), WIDTH)), *map(torch.empty_like, packs[:2])


def _projections(
    x: Tensor, weights: list[Tensor], biases: Any, Ap: Tensor, *_: Any
) -> tuple[list[Tensor], Tensor]:
    return [x.new_empty((len(x), WIDTH)) for _ in weights], x.new_empty((len(x), len(Ap)))


def _projections_backward(
    grads: list[Tensor], x: Any, weights: Any, U: Any, Ap: Tensor, Bp: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.empty_like(grads[0]), torch.empty_like(Ap), [torch.empty_like(up) for up in Bp]


def _pack(A: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(A[0].new_empty((len(A), 16, WIDTH)) for _ in range(2))


def _pack_backward(
    downs: Any, ups: Any, B: list[Tensor], B_pool: Tensor, d: list[Tensor]
) -> tuple[Tensor, ...]:
    # In the parameters' layout, so that autograd uses them without a copy.
    dA, dB = (d[0].new_empty((len(B), *shape)) for shape in (B[0].shape[::-1], B[0].shape))
    dA_pool = B_pool.new_empty(B_pool.shape[::-1])
    return dA, dA_pool, dB, torch.empty_like(B_pool), d[0].new_empty((len(d), *d[0].shape))


# Operators that compute nothing, and heuristics that choose as on a GPU.
STUBS = {
    "low_rank_linear": _forward,
    "low_rank_linear_backward": _backward,
    "linear_projections": _projections,
    "linear_projections_backward": _projections_backward,
    "pack_group": _pack,
    "pack_group_backward": _pack_backward,
    "rank_multiple": lambda *_: 16,
    "fuse_projections": lambda *_: True,
}


def chain(length: int, adapted: bool, names: tuple[str, ...] = NAMES[:1]) -> Callable[[], None]:
    """Return a step on one token through ``length`` blocks of linears that read one input."""
    blocks = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names})
        for _ in range(length)
    )
    blocks.requires_grad_(False)
    if adapted:
        rasa_ext.patch_model(blocks, rank=8, k=1)
    parameters = list(blocks.parameters())
    layers = [list(block.values()) for block in blocks]
    given = torch.randn(1, WIDTH, requires_grad=True)
    grads = [torch.ones(1, WIDTH)] * (length * (len(names) - 1) + 1)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        x, others = given, []
        for first, *more in layers:
            y = first(x)
            others += [layer(x) for layer in more]
            x = y
        torch.autograd.backward([x, *others], grads)

    return step


def measured(rounds: int, limit: float, **chains: tuple) -> dict[str, tuple[float, float]]:
    """Return lower quartiles in microseconds, by chain.

    They are of one more block, and of a step without blocks.
    """
    run = {(name, n): chain(n, *how) for name, how in chains.items() for n in LENGTHS}
    seconds = harness.interleaved(run, rounds, warmup=20, device="cpu", at_most=limit)
    found = {}
    for name in chains:
        short, long = (1e6 * harness.quartiles(seconds[name, n])[0] for n in LENGTHS)
        slope = (long - short) / (LENGTHS[1] - LENGTHS[0])
        found[name] = slope, short - LENGTHS[0] * slope
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit")
    given = parser.parse_args()
    rounds, limit = given.rounds, given.seconds / 2
    torch.set_num_threads(1)
    x, pack = torch.randn(1, WIDTH), torch.randn(16, WIDTH)
    stubs = {"": lambda: (_forward(x), _backward(x, None, None, None, pack, pack))}
    seconds = harness.interleaved(stubs, rounds, warmup=20, device="cpu")
    with mock.patch.multiple(ops, **STUBS):
        alone = measured(rounds, limit, frozen=(False,), ours=(True,))
        fused = measured(rounds, limit, ours=(True,), fused=(True, NAMES))
    shown = {
        "nn.Linear": alone["frozen"][0],
        "rasa_ext": alone["ours"][0],
        f"1/{LAYERS} of a group": (alone["ours"][1] - alone["frozen"][1]) / LAYERS,
        "of it stubs": 1e6 * harness.quartiles(seconds[""])[0],
        "fused": (fused["fused"][0] - fused["ours"][0]) / (len(NAMES) - 1),
    }
    results = records.Results(given.json, "cpu")
    results.add(what="microseconds a layer and step", **shown)


if __name__ == "__main__":
    main()
