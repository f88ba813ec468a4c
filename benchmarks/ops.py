"""Each operator against its PyTorch kernel on the same device, and against the device's limits.

    python -m benchmarks.ops [products] [one] [model] [--device cuda] [--json FILE] [--seconds 60]

- ``products``: only the matrix products of one linear's step (benchmarks.products).
- ``one``: the operators of one linear, for every shape of a decoder layer.
- ``model``: the operators over all layers, a group of equal layers at a time: packing a model's
  adapters, their gradients, and merging them into the weights; then the sums over the model.

``bound`` is the operator's time over the least time that its bytes (every argument and result once)
and FLOPs allow, at this device's copy bandwidth and GEMM rate (benchmarks.roofline). ``of_copy`` is
the share of the copy bandwidth. On a CUDA device the times are of the kernels only, ours and
PyTorch's, and separate columns have the host's time to launch them.
"""

from __future__ import annotations

import statistics
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import calls, harness, products, roofline
from benchmarks.linears import said
from benchmarks.records import Budget, Results, parser
from benchmarks.shapes import BLOCKS, RANKS, Block, Linear, default_blocks

RANK, K = RANKS[0]


class Bench:
    """What all measurements of a run share."""

    def __init__(self, given) -> None:
        self.device, self.quick = given.device, given.quick
        self.dtype = getattr(torch, given.dtype)
        self.rounds = 2 if given.quick else given.rounds
        on_gpu = given.device.startswith("cuda")
        self.M = 24 if given.quick else 8192 if on_gpu else 512
        self.peaks = roofline.measure(given.device, self.dtype, given.quick)
        self.results = Results(given.json, given.device)
        self.results.add(**self.peaks.row(given.device, given.dtype))

    def one_linear(self, block: Block, linear: Linear, seconds: float) -> None:
        """Measure every operator of one linear."""
        adapter = calls.adapters(linear, block.layers, RANK, K, self.device)
        todo = calls.one_linear(linear, adapter, self.M, self.dtype, self.device)
        for call in todo:
            self._measure(call, block, linear, seconds / len(todo), M=self.M)

    def products(self, block: Block, linear: Linear, seconds: float) -> None:
        """Measure every product of one linear's step, each with cold caches."""
        rank = block.effective_rank(RANK, K)
        made = products.of_linear(linear, self.M, rank, self.dtype, self.device)
        runs = {name: product.run for name, product in made.items()}
        how = {"device": self.device, "hide_launches": True, "cold": True}
        times = harness.interleaved(runs, self.rounds, at_most=seconds, **how)
        for name, product in made.items():
            low, middle, high = harness.quartiles(times[name])
            self.results.add(
                what=name,
                block=block.name,
                in_x_out=f"{linear.in_features}x{linear.out_features}",
                M=self.M,
                us=1e6 * middle,
                us_low=1e6 * low,
                us_high=1e6 * high,
                rounds=len(times[name]),
                tb_s=product.work.bytes / middle / 1e12,
                tflop_s=product.work.flops / middle / 1e12,
                of_copy=product.work.bytes / middle / self.peaks.bandwidth,
                bound=middle / self.peaks.bound(product.work),
            )

    def model(self, block: Block, seconds: float) -> None:
        """Measure operators over groups, one call for each group, and their sums over a model."""
        shapes = Counter((each.in_features, each.out_features) for each in block.linears)
        took: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        whole = True
        for linear in different(block):
            layers = self._fitting(block.layers, linear)
            whole &= layers == block.layers
            adapter = calls.adapters(linear, layers, RANK, K, self.device)
            for call in calls.group(linear, adapter, self.dtype, self.device):
                share = seconds / len(shapes) / 3
                middle = self._measure(call, block, linear, share, layers=layers)
                for name, value in middle.items():
                    times = shapes[linear.in_features, linear.out_features] * block.layers / layers
                    took[call.name][name] += times * value
        for name, sums in took.items():
            self.results.add(
                what=f"{name}, {'whole model' if whole else 'whole model, extrapolated'}",
                block=block.name,
                layers=block.layers,
                us=1e6 * sums["ours"],
                pytorch_over_ours=sums["pytorch"] / sums["ours"],
            )

    def _fitting(self, layers: int, linear: Linear) -> int:
        if not self.device.startswith("cuda"):
            return layers
        torch.cuda.empty_cache()
        # Three times the weights: the weights, and the copy's two buffers of half the bytes moved.
        # The rest of the memory is for the check in float64.
        each = 3 * self.dtype.itemsize * linear.in_features * linear.out_features
        return max(1, min(layers, int(0.8 * torch.cuda.mem_get_info()[0]) // each))

    def _measure(
        self, call: calls.Call, block: Block, linear: Linear, seconds: float, **row
    ) -> dict[str, float]:
        """Add a row; return the medians of ours, PyTorch's and the copy."""
        times, host, work = calls.measure(call, self.dtype, self.device, self.rounds, seconds)
        low, middle, high = harness.quartiles(times["ours"])
        median = {name: statistics.median(values) for name, values in times.items()}
        self.results.add(
            what=call.name,
            block=block.name,
            in_x_out=f"{linear.in_features}x{linear.out_features}",
            **row,
            us=1e6 * middle,
            us_low=1e6 * low,
            us_high=1e6 * high,
            rounds=len(times["ours"]),
            pytorch_over_ours=median["pytorch"] / middle,
            bound=middle / self.peaks.bound(work),
            of_copy=median["copy"] / middle,
            mib=work.bytes / 2**20,
            gflop=work.flops / 1e9,
            **{f"{name}_host_us": 1e6 * value for name, value in host.items()},
        )
        return median


def different(block: Block) -> list[Linear]:
    """Return one linear of each shape."""
    return list({(each.in_features, each.out_features): each for each in block.linears}.values())


def todo(bench: Bench, what: list[str], blocks: list[str]) -> Iterator[partial[None]]:
    """Yield measurements, each a function of the seconds that it may take."""
    for block in (BLOCKS[name] for name in blocks):
        if "products" in what:
            yield from (partial(bench.products, block, linear) for linear in different(block))
        if "model" in what:
            yield partial(bench.model, block)
        if "one" in what:
            yield from (partial(bench.one_linear, block, linear) for linear in different(block))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("what", nargs="*", choices=["products", "one", "model"], default="model")
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
        try:
            measure(budget.share(len(measurements) - index))
        except Exception as error:
            traceback.print_exc()
            bench.results.add(what=measure.func.__name__, failed=said(error))
    sys.exit(int(any("failed" in row for row in bench.results.rows)))


if __name__ == "__main__":
    main()
