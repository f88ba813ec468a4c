"""Each operator against its PyTorch kernel on the same device, and against what the device can do.

    python -m benchmarks.ops [one] [model] [--device cuda] [--json FILE] [--seconds 60]

- ``one``: the operators of one linear, for every shape of a decoder layer.
- ``model``: the operators over all layers, each group of equal layers at once: packing a model's
  adapters, their gradients, and merging them into its weights.

``bound`` is the operator's time over the least that its bytes (every argument and result once) and
FLOPs allow, at the copy bandwidth and GEMM rate of this device (benchmarks.roofline); ``of_copy``
is its share of the copy bandwidth. On a CUDA device the times are the kernels' alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import calls, harness, roofline
from benchmarks.records import Budget, Results, parser
from benchmarks.shapes import BLOCKS, RANKS, Block, Linear, default_blocks

RANK, K = RANKS[0]


class Bench:
    """What all measurements of a run have in common."""

    def __init__(self, given) -> None:
        self.device, self.quick = given.device, given.quick
        self.dtype = getattr(torch, given.dtype)
        self.rounds = 2 if given.quick else given.rounds
        on_gpu = given.device.startswith("cuda")
        self.M = 24 if given.quick else 8192 if on_gpu else 512
        self.peaks = roofline.measure(given.device, self.dtype, given.quick)
        self.results = Results(given.json, given.device)
        self.results.add(
            what="peaks",
            dtype=given.dtype,
            copy_gb_s=self.peaks.bandwidth / 1e9,
            gemm_tflop_s=self.peaks.flops / 1e12,
        )

    def one_linear(self, block: Block, linear: Linear, seconds: float) -> None:
        """Every operator of one linear."""
        adapter = calls.adapters(linear, block.layers, RANK, K, self.device)
        todo = calls.one_linear(linear, adapter, self.M, self.dtype, self.device)
        for call in todo:
            self._measure([call], block, linear, seconds / len(todo), M=self.M)

    def packs(self, block: Block, seconds: float) -> None:
        """A model's packs, and their backward: one operator call for each group of equal layers."""
        made = []
        for linear in block.linears:
            adapter = calls.adapters(linear, block.layers, RANK, K, self.device)
            made.append(calls.packing(linear, adapter, self.dtype, self.device))
        for todo in zip(*made, strict=True):
            self._measure(list(todo), block, None, seconds / 2, layers=block.layers)

    def merge(self, block: Block, linear: Linear, seconds: float) -> float:
        """A group's adapters into its weights; fewer layers where memory is short."""
        layers = self._fitting(block.layers, linear)
        adapter = calls.adapters(linear, layers, RANK, K, self.device)
        call = calls.merging(linear, adapter, self.dtype, self.device)
        return self._measure([call], block, linear, seconds, layers=layers) / layers

    def merges(self, block: Block, seconds: float) -> None:
        """A model's adapters into its weights, group by group, so that one group's fit."""
        share, begin = seconds / len(block.linears), len(self.results.rows)
        took = sum(self.merge(block, linear, share) for linear in block.linears) * block.layers
        rows = self.results.rows[begin:]
        layers = min(row["layers"] for row in rows)
        self.results.add(
            what="merge of a model" if layers == block.layers else "merge of a model, extrapolated",
            block=block.name,
            in_x_out="sum of medians",
            layers=block.layers,
            us=1e6 * took,
        )

    def _fitting(self, layers: int, linear: Linear) -> int:
        if not self.device.startswith("cuda"):
            return layers
        torch.cuda.empty_cache()
        # The weights, the copy's two buffers of half their bytes in and out, the check's float64.
        each = 3 * self.dtype.itemsize * linear.in_features * linear.out_features
        return max(1, min(layers, int(0.8 * torch.cuda.mem_get_info()[0]) // each))

    def _measure(
        self, todo: list[calls.Call], block: Block, linear: Linear | None, seconds: float, **row
    ) -> float:
        times, work = calls.measure(todo, self.dtype, self.device, self.rounds, seconds)
        low, middle, high = harness.quartiles(times["ours"])
        shape = f"{linear.in_features}x{linear.out_features}" if linear else "all groups"
        self.results.add(
            what=todo[0].name,
            block=block.name,
            in_x_out=shape,
            **row,
            us=1e6 * middle,
            us_low=1e6 * low,
            us_high=1e6 * high,
            rounds=len(times["ours"]),
            pytorch_over_ours=statistics.median(times["pytorch"]) / middle,
            bound=middle / self.peaks.bound(work),
            of_copy=statistics.median(times["copy"]) / middle,
            mib=work.bytes / 2**20,
            gflop=work.flops / 1e9,
        )
        return middle


def different(block: Block) -> list[Linear]:
    """One linear of each shape."""
    return list({(each.in_features, each.out_features): each for each in block.linears}.values())


def todo(bench: Bench, what: list[str], blocks: list[str]) -> Iterator[Callable[[float], object]]:
    """Measurements, each a function of the seconds that it may take."""
    for block in (BLOCKS[name] for name in blocks):
        if "model" in what:
            yield partial(bench.packs, block)
            yield partial(bench.merges, block)
        if "one" in what:
            yield from (partial(bench.one_linear, block, linear) for linear in different(block))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("what", nargs="*", choices=["one", "model"], default="model")
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--blocks", nargs="+", choices=list(BLOCKS))
    arguments.add_argument("--rounds", type=int, default=30)
    given = arguments.parse_args()
    what = [given.what] if isinstance(given.what, str) else given.what
    harness.pin_allocator()
    budget, bench = Budget(given.seconds), Bench(given)
    measurements = list(
        todo(bench, what, given.blocks or default_blocks(given.device, given.quick))
    )
    for index, measure in enumerate(measurements):
        if budget.left() <= 0:
            bench.results.add(what="not run: out of time", left=len(measurements) - index)
            break
        measure(budget.share(len(measurements) - index))


if __name__ == "__main__":
    main()
