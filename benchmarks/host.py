"""Host time of a linear and training step: Python, autograd and dispatch, without any product.

    python -m benchmarks.host [--rounds 300]

The operators are replaced by stubs that return uninitialised results, and a chain of layers is
measured at two lengths: the slope between them is a layer's own. What remains is what keeps a GPU
waiting where it has little to do; the compiled operators' share and the launches are not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rasa_ext
from benchmarks import harness
from rasa_ext import ops
from rasa_ext.nn import adapted_linear, functional, fused_projections

WIDTH, LENGTHS = 64, (4, 20)


def _forward(y: Any, x: Tensor, weight: Any, bias: Any, A: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty((x.shape[0], WIDTH)), x.new_empty((x.shape[0], 8))


def _backward(
    grad: Tensor, x: Any, weight: Any, U: Any, A: Any, A_pool: Any, B: Any, B_pool: Any,
    d: Any, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return grad.new_empty((grad.shape[0], WIDTH)), *(
        None if t is None else torch.empty_like(t) for t in (A, A_pool, B, B_pool, d)
    )


@contextmanager
def stubbed() -> Iterator[None]:
    """Operators that compute nothing, for a linear that is not fused, as on a GPU."""
    names = {name: getattr(ops, name) for name in ops.__all__}
    stubs = {
        "adapted_linear": _forward,
        "adapted_linear_backward": _backward,
        "rank_multiple": lambda *_: 16,
        "fuse_projections": lambda *_: False,
        "torch_differentiates": lambda _: False,
    }
    before = [(module, module.ops) for module in (adapted_linear, functional, fused_projections)]
    for module, _ in before:
        module.ops = SimpleNamespace(**(names | stubs))
    try:
        yield
    finally:
        for module, its in before:
            module.ops = its


def chain(length: int, adapted: bool) -> Callable[[], None]:
    """A step through so many linears, one after the other, on one token."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(length)))
    if adapted:
        rasa_ext.patch_model(model, rank=8, k=1)
    else:
        model.requires_grad_(False)
    parameters = list(model.parameters())
    x = torch.randn(1, WIDTH, requires_grad=True)
    grad = torch.ones(1, WIDTH)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(x).backward(grad)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    x, factors = torch.randn(1, WIDTH), [torch.randn(8, WIDTH) for _ in range(5)]
    torch.set_num_threads(1)
    with stubbed():
        run = {
            f"{name} {length}": chain(length, name == "rasa_ext")
            for name in ("nn.Linear", "rasa_ext")
            for length in LENGTHS
        }
        run["stubs"] = lambda: (
            _forward(None, x, None, None, x),
            _backward(x, *[None] * 3, *factors),
        )
        seconds = harness.interleaved(run, arguments.rounds, warmup=20, device="cpu")
    print(f"{harness.machine()}\nmicroseconds a layer and step: lower quartiles")
    for name in ("nn.Linear", "rasa_ext"):
        short, long = (harness.quartiles(seconds[f"{name} {n}"])[0] for n in LENGTHS)
        print(f"{name:10} {1e6 * (long - short) / (LENGTHS[1] - LENGTHS[0]):6.1f}")
    print(f"{'of it stubs':11} {1e6 * harness.quartiles(seconds['stubs'])[0]:5.1f}")


if __name__ == "__main__":
    main()
