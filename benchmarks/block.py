"""The linears of a decoder layer: what adapters add to a training step and to decoding.

    python -m benchmarks.block [step] [decode] [growth] [compiled] [--device cuda] [--json FILE]

Every variant runs over the same weights, checked to be one function where it should be. Columns:

- over_frozen: the variant's time over that of the frozen linears;
- removed: (official - variant) / (official - frozen), the share of the official overhead removed;
- roofline: the variant's time over the bound of its bytes and FLOPs (benchmarks.roofline);
- saved: bytes kept for the backward, parameters left out; peak: bytes above what was held before;
- kernels: launched on the device in one step.

``decode`` is a forward without grad of M = 1 and 16 tokens, as it is and replayed as a CUDA graph.
``growth`` is the step of one linear while the model's layers, or k, become more.
``compiled`` is the step of the largest M with torch.compile's version of the official formula.
The most telling cases come first, and the time that is given ends the list.
"""

from __future__ import annotations

import gc
import itertools
import statistics

import torch
from torch import nn

from benchmarks import harness, roofline
from benchmarks.linears import Case
from benchmarks.records import Budget, Results, parser
from benchmarks.shapes import BLOCKS, RANKS, TOKENS, Block, default_blocks, single


def saved_bytes(case: Case, module: nn.Module, run) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, no parameters."""
    kept: dict[int, int] = {}
    parameters = {tensor.untyped_storage().data_ptr() for tensor in case.parameters(module)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def peak_bytes(case: Case, module: nn.Module, run) -> int:
    """Memory that a step adds at its peak, gradients included."""
    run()
    case.drop_gradients(module)
    if not case.device.startswith("cuda"):
        return cpu_peak_bytes(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(run) -> int:
    """The most that one call has allocated at a time, from the profiler's list of allocations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    # profile.events() has lost those that happened within an operator.
    events = profile.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in changes), initial=0))


def kernel_count(run, device: str) -> int | None:
    """Kernels, copies and fills that one call starts on the device."""
    if not device.startswith("cuda"):
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def add_times(results: Results, seconds: dict, bounds: dict, extra: dict, **case) -> None:
    """One row a variant."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    over = middle["official"] - middle["frozen"]
    for name, values in seconds.items():
        low, median, high = harness.quartiles(values)
        results.add(
            **case,
            variant=name,
            us=1e6 * median,
            us_low=1e6 * low,
            us_high=1e6 * high,
            rounds=len(values),
            over_frozen=median / middle["frozen"],
            removed=(middle["official"] - median) / over if over else None,
            roofline=median / bounds[name],
            **extra.get(name, {}),
        )


def bound(case: Case, variant: str, peaks: roofline.Peaks, train: bool) -> float:
    """Seconds that the linears need one after the other."""
    work = roofline.linear_step if train else roofline.linear_forward
    rank, size = case.adapter_rank(variant), case.dtype.itemsize
    return sum(
        peaks.bound(work(case.M, each.in_features, each.out_features, rank, size))
        for each in case.block.linears
    )


def without_broken(case: Case, make, variants: dict[str, nn.Module], results: Results, **row):
    """``make(module)`` of every variant that gets through it; the others leave a row that says why.

    Only baselines may fail; ours and those it is set against must not.
    """
    made = {}
    for name, module in variants.items():
        try:
            made[name] = make(module)
            made[name]()
        except Exception as error:
            if name in ("frozen", "official", "ours"):
                raise
            made.pop(name, None)
            results.add(**row, variant=name, failed=f"{type(error).__name__}: {error}"[:300])
    return made


def step(case: Case, results: Results, peaks, seconds: float, rounds: int, what: str) -> None:
    """A training step in every variant."""
    budget = Budget(seconds)
    row = {"what": what, **describe(case)}
    torch._dynamo.reset()
    variants = case.variants(compiled=what == "compiled")
    case.verify({name: m for name, m in variants.items() if name != "compiled"})
    runs = without_broken(case, case.step, variants, results, **row)
    extra = {
        name: {
            # Hooks would make a compiled graph compile again.
            "saved": None if name == "compiled" else saved_bytes(case, variants[name], run),
            "peak": peak_bytes(case, variants[name], run),
            "kernels": kernel_count(run, case.device),
        }
        for name, run in runs.items()
    }
    times = harness.interleaved(runs, rounds, device=case.device, at_most=budget.left(), cold=True)
    bounds = {name: bound(case, name, peaks, train=True) for name in runs}
    add_times(results, times, bounds, extra, **row)


def decode(case: Case, results: Results, peaks, seconds: float, rounds: int) -> None:
    """A forward without grad: called, and on a CUDA device replayed."""
    variants = {name: module.eval() for name, module in case.variants().items()}
    case.verify(variants)
    cuda = case.device.startswith("cuda")
    for graph in (False, True)[: 1 + cuda]:
        row = {"what": "decode as a graph" if graph else "decode", **describe(case)}

        def make(module: nn.Module, graph: bool = graph):
            return replay(case.forward(module)) if graph else case.forward(module)

        runs = without_broken(case, make, variants, results, **row)
        share = seconds / (1 + cuda)
        times = harness.interleaved(runs, rounds, device=case.device, at_most=share, cold=True)
        bounds = {name: bound(case, name, peaks, train=False) for name in runs}
        add_times(results, times, bounds, {}, **row)


def replay(run):
    """``run`` captured once; what is returned replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for found, value in zip(captured, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=2e-2, atol=2e-2)
    return graph.replay


def describe(case: Case) -> dict:
    dtype = str(case.dtype).removeprefix("torch.")
    return {"block": case.block.name, "dtype": dtype, "M": case.M, "R": case.R, "k": case.k}


def cases(what: list[str], device: str, quick: bool, blocks: list[str]) -> list[tuple]:
    """(what, block, M, rank, k): the largest M and smallest rank of each block first."""
    named = [BLOCKS[name] for name in blocks]
    # A CPU takes seconds for a step of the largest M, and nearly one for the next.
    cuda = device.startswith("cuda")
    tokens = (2, 5, 40) if quick else TOKENS if cuda else TOKENS[:-1]
    found: list[tuple[str, Block, int, int, int]] = []
    for kind in [kind for kind in ("step", "decode") if kind in what]:
        fitting = [M for M in tokens if (M > 16) == (kind == "step")]
        for (rank, k), M, block in itertools.product(RANKS, sorted(fitting, reverse=True), named):
            if cuda or quick or (rank, k) == RANKS[0] or max(tokens) > M:
                found.append((kind, block, M, rank, k))
    found = found[: 2 if quick else None]
    if "compiled" in what:
        found += [("compiled", block, max(tokens), *RANKS[0]) for block in named]
    if "growth" in what:
        width = named[0].linears[0].in_features
        M = width if quick else 2048
        for layers in (2, 4) if quick else (8, 16, 32, 64, 128):
            found.append(("growth", single(width, width, layers), M, 8, 1))
        for k in (8,) if quick else (2, 4, 8):
            found.append(("growth", single(width, width, 4 if quick else 32), M, 8, k))
    return found


def main() -> None:
    arguments = parser(__doc__)
    kinds = ["step", "decode", "growth", "compiled"]
    arguments.add_argument("what", nargs="*", choices=kinds, default="step")
    arguments.add_argument("--dtype", nargs="+", default=["bfloat16"])
    arguments.add_argument("--blocks", nargs="+", choices=list(BLOCKS))
    arguments.add_argument("--rounds", type=int, default=30)
    given = arguments.parse_args()
    what = [given.what] if isinstance(given.what, str) else given.what
    blocks = given.blocks or default_blocks(given.device, given.quick)
    rounds = 2 if given.quick else given.rounds
    harness.pin_allocator()
    budget, results = Budget(given.seconds), Results(given.json, given.device)
    todo = list(itertools.product(given.dtype, cases(what, given.device, given.quick, blocks)))
    peaks = {
        name: roofline.measure(given.device, getattr(torch, name), given.quick)
        for name in given.dtype
    }
    for index, (name, (kind, block, M, rank, k)) in enumerate(todo):
        if budget.left() <= 0:
            results.add(what="not run: out of time", left=len(todo) - index)
            break
        gc.collect()  # what the case before held on the device
        case = Case(block, M, rank, k, getattr(torch, name), given.device)
        share = budget.share(len(todo) - index)
        if kind == "decode":
            decode(case, results, peaks[name], share, rounds)
        else:
            step(case, results, peaks[name], share, rounds, kind)
        del case


if __name__ == "__main__":
    main()
