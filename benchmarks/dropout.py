"""What dropout of the adapter's input adds to a training step of one linear.

    python -m benchmarks.dropout [--dtype float32 bfloat16] [--p 0.05] [--rounds 40]
                                 [--shapes 512,576,1536 ...] [--device cpu]

For each (M, in, out), R = 39: a step with p = 0, with dropout inside the operators, and with
``nn.functional.dropout`` before the same adapter (``naive``). ``added`` is the time that ours adds
over the time that naive adds. ``kept`` is the bytes that each stores for the backward beyond p = 0.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses

import torch
from torch import nn

import rasa_ext
from benchmarks import harness, layer
from rasa_ext.nn import functional


class Naive(nn.Module):
    """The adapter over a copy of x with dropout, and the base beside it."""

    def __init__(self, ours: rasa_ext.RasaLinear, p: float) -> None:
        super().__init__()
        self.ours, self.p = ours, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (M, in) to (M, out)."""
        y, x = self.ours.base_layer(x), nn.functional.dropout(x, self.p)
        return functional.low_rank_linear(x, None, None, self.ours.adapter().pack(x.dtype), y=y)


def kept(module: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes of the storages that autograd stores, each once."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(storages.values())


def compare(shape: tuple[int, int, int], dtype: torch.dtype, p: float, rounds: int, device: str):
    """Print one row."""
    x, grad, modules = layer.layers(shape, dtype, device)
    layer.verify(modules, x)
    without = modules["ours"].train()
    dropped = copy.deepcopy(without, {id(t): t for t in without.parameters()})
    dropped.config = dataclasses.replace(without.config, dropout=p)
    variants = {
        "frozen": modules["frozen"], "p = 0": without, "ours": dropped, "naive": Naive(without, p),
    }  # fmt: skip
    parameters = without.adapter().sources()
    steps = {name: layer.training(m, x, grad, parameters) for name, m in variants.items()}
    seconds = harness.interleaved(steps, rounds, warmup=5, device=device)
    us = {name: 1e6 * harness.quartiles(values)[1] for name, values in seconds.items()}
    added = (us["ours"] - us["p = 0"]) / (us["naive"] - us["p = 0"])
    base = kept(without, x)
    mine, theirs = kept(dropped, x) - base, kept(variants["naive"], x) - base
    print(
        f"{shape!s:20}" + "".join(f"{us[name]:9.0f}" for name in variants) + f"{added:8.2f}"
        f"{us['ours'] / us['naive']:8.2f}{us['ours'] / us['p = 0']:8.2f}{mine:10,}{theirs:12,}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--p", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--shapes", nargs="+", default=[",".join(map(str, s)) for s in layer.SHAPES]
    )
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    harness.pin_allocator()
    for dtype in given.dtype:
        print(f"\n{dtype}, p = {given.p}, {harness.machine()}; microseconds a step")
        print("(M, in, out)           frozen    p = 0     ours    naive   added", end=" ")
        print("  /naive  /p=0      kept  naive keeps")
        for text in given.shapes:
            shape = tuple(int(n) for n in text.split(","))
            compare(shape, getattr(torch, dtype), given.p, given.rounds, given.device)


if __name__ == "__main__":
    main()
