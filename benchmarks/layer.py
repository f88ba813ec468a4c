"""One adapted linear: overhead over the frozen base, ours against the official formula.

    python -m benchmarks.layer [--dtype float32 bfloat16] [--rounds 40] [--shapes 512,576,1536 ...]
                               [--device cpu] [--json FILE] [--seconds S]

For each (M, in, out): a training step (forward, backward, gradients dropped) and a forward without
grad (packs cached). ``ratio`` is (ours - frozen) / (official - frozen), from the medians of both
differences. ``gemms`` is that ratio for only the GEMMs of adapter and base, a floor. Before timing,
ours and official are checked to compute the same function. Caches are not flushed: the variants
take turns in a random order.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import nn

import rasa_ext
from benchmarks import baselines, harness, records
from rasa_ext import ops

SHAPES = (
    (1024, 1024, 1024),
    (2048, 512, 512),
    (512, 576, 1536),
    (1024, 2048, 2048),
    (256, 2048, 2048),
    (16, 2048, 2048),
)
LAYERS, RANK, K = 32, 8, 1


def layers(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu"):
    """Return input, upstream gradient and the modules frozen, official and ours; R = 39."""
    torch.manual_seed(0)
    M, width, out = shape
    stack = nn.Sequential(nn.Linear(width, out, bias=False))
    base = stack[0].to(dtype).requires_grad_(False)
    config = rasa_ext.RasaConfig(rank=RANK, k=K)
    ours = baselines.one_of(base, config, LAYERS)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter is not base.weight:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    ours.to(device)
    x = torch.randn(M, width).to(device, dtype).requires_grad_()
    grad = torch.randn(M, out).to(device, dtype)
    return x, grad, {"frozen": base, "official": baselines.OfficialLinear(ours), "ours": ours}


def verify(modules: dict, x: torch.Tensor) -> None:
    with torch.no_grad():
        mine, theirs = modules["ours"](x), modules["official"](x)
    error = ((mine - theirs).norm() / theirs.norm()).item()
    if error > (1e-5 if x.dtype == torch.float32 else 1e-2):
        raise SystemExit(f"ours and official differ by {error:.2e}")


def gemms(x: torch.Tensor, grad: torch.Tensor, ours: rasa_ext.RasaLinear, training: bool):
    """Return a function that runs only the GEMMs that every implementation needs."""
    x, weight = x.detach(), ours.base_layer.weight
    with torch.no_grad():
        pack = ours.adapter().pack(x.dtype)[:2]

    def run() -> None:
        with torch.no_grad():
            _, U = ops.low_rank_linear(x, weight, None, *pack)
            if training:
                ops.low_rank_linear_backward(grad, x, weight, U, *pack, True, True, True)

    return run


def training(module: nn.Module, x: torch.Tensor, grad: torch.Tensor, parameters: tuple):
    def step() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        module(x).backward(grad)

    return step


def forward(module: nn.Module, x: torch.Tensor):
    step = x.detach()[:, None]  # one token of M sequences, as in generate, which packs nothing

    def run() -> None:
        with torch.no_grad():
            module(step)

    return run


def compare(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rounds: int,
    train: bool,
    device: str = "cpu",
    rows: list[dict] | None = None,
    at_most: float = math.inf,
) -> float:
    """Print one row, add it to ``rows``, and return the overhead ratio."""
    x, grad, modules = layers(shape, dtype, device)
    verify(modules, x)
    parameters = (*modules["ours"].adapter().sources(), *modules["official"].parameters())
    run = {
        name: training(module, x, grad, parameters) if train else forward(module, x)
        for name, module in modules.items()
    }
    run["gemms"] = gemms(x, grad, modules["ours"], train)
    seconds = harness.interleaved(run, rounds, warmup=5, device=device, at_most=at_most)
    middle = {name: 1e6 * harness.quartiles(values)[1] for name, values in seconds.items()}
    spread = [1e6 * v for v in harness.quartiles(seconds["ours"])]
    ratio = harness.overhead_ratio(seconds, "ours", "official", "frozen")
    floor = harness.overhead_ratio(seconds, "gemms", "official", "frozen")
    print(
        f"{'step' if train else 'no grad':8} {shape!s:20} {middle['frozen']:9.0f} "
        f"{middle['official']:9.0f} {middle['ours']:9.0f} "
        f"({spread[0]:.0f}-{spread[2]:.0f}) {ratio:6.2f} {floor:6.2f}",
        flush=True,
    )
    if rows is not None:
        row = {"what": "step" if train else "no grad", "dtype": str(dtype).removeprefix("torch.")}
        row |= dict(zip(("M", "in", "out"), shape, strict=True))
        row |= {
            f"{name}_us": quartiles for name, quartiles in sorted(microseconds(seconds).items())
        }
        rows.append({**row, "ratio": ratio, "gemms": floor})
    return ratio


def microseconds(seconds: dict[str, list[float]]) -> dict[str, tuple[float, ...]]:
    """Return the quartiles of each variant, in microseconds."""
    return {
        name: tuple(1e6 * value for value in harness.quartiles(values))
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit for all rounds")
    arguments = parser.parse_args()
    rows: list[dict] = []
    harness.pin_allocator()
    budget = records.Budget(arguments.seconds)
    cases = 2 * len(arguments.shapes) * len(arguments.dtype)
    shapes = [tuple(int(n) for n in text.split(",")) for text in arguments.shapes]
    for dtype in arguments.dtype:
        print(f"\n{dtype}, R = {RANK - K + LAYERS * K}, {harness.machine()}")
        print("         (M, in, out)       frozen us  official      ours (quartiles) ratio  gemms")
        for train in (True, False):
            how = (getattr(torch, dtype), arguments.rounds, train, arguments.device, rows)
            ratios = {}
            for shape in shapes:
                ratios[shape] = compare(shape, *how, budget.share(cases))
                cases -= 1
                write(arguments, rows)
            big = [ratio for (M, _, _), ratio in ratios.items() if M >= 512 or not train]
            if big and min(big) > 0:
                mean = math.exp(sum(map(math.log, big)) / len(big))
                which = "M >= 512" if train else "all shapes"
                largest = max(ratios.values())
                print(f"geometric mean over {which}: {mean:.3f}; largest {largest:.2f}")
                summary = {"what": "step" if train else "no grad", "dtype": dtype, "over": which}
                rows.append({**summary, "geometric_mean": mean, "largest": largest})
    write(arguments, rows)


def write(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Write all rows so far, so that an interruption loses none."""
    if arguments.json:
        head = records.environment(arguments.device)
        records.write_json(arguments.json, {"machine": head, "rows": rows})


if __name__ == "__main__":
    main()
