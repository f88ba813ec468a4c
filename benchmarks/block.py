"""The linears of a decoder layer: what adapters add to a training step and to decoding.

    python -m benchmarks.block [step] [decode] [growth] [compiled] [--device cuda] [--json FILE]

Every variant runs over the same weights, and variants that should be one function are checked to
be. A variant that fails the check or raises gets a row with the reason, and the others are
measured. Columns:

- over_frozen: the variant's time over the time of the frozen linears;
- removed: (official - variant) / (official - frozen), the share of the official overhead removed,
  from the medians of the differences by round;
- roofline: the variant's time over the bound of its bytes and FLOPs (benchmarks.roofline);
- saved: bytes stored for the backward, without parameters; peak: bytes above the memory in use
  before;
- host_us: time until the host has launched a step; graph_us: the step replayed as a CUDA graph,
  which does not wait for the host. Both only on a CUDA device.

``ours, cublas`` is ours without the kernels of csrc/cuda/skinny.cuh (RASA_EXT_KERNELS=cublas).
``step`` has the largest shapes with dropout 0.05 first, and then all shapes without dropout.
``decode`` is a forward without grad of M = 1 and 16 tokens, called, and replayed as a CUDA graph.
Every replay packs again, since it must use the current parameters.
``growth`` is the step of one linear as the number of layers, or k, grows.
``compiled`` is the step of the largest M with the official formula under torch.compile.

The most important case comes first and gets all its rounds. The others share the remaining time,
and the list ends when the time does. The exit status is 1 if ours failed anywhere.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks import harness, roofline
from benchmarks.linears import Case, said
from benchmarks.records import Budget, Results, parser
from benchmarks.shapes import BLOCKS, RANKS, TOKENS, Block, default_blocks, single


def saved_bytes(case: Case, module: nn.Module, run) -> int:
    """Return the bytes that autograd stores for the backward: no parameters, each storage once."""
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
    """Return the memory that a step adds at its peak, with gradients."""
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
    """Return the most bytes that one call allocates at a time.

    They come from the profiler's list of allocations.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    # profile.events() lacks allocations within an operator.
    events = profile.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in changes), initial=0))


def add_times(results: Results, seconds: dict, bounds: dict[str, float], **case) -> dict[str, dict]:
    """Add a row for each variant, and return the rows by name."""
    frozen = statistics.median(seconds["frozen"]) if "frozen" in seconds else None
    rows = {}
    for name, values in seconds.items():
        low, median, high = harness.quartiles(values)
        rows[name] = results.add(
            **case,
            variant=name,
            us=1e6 * median,
            us_low=1e6 * low,
            us_high=1e6 * high,
            rounds=len(values),
            over_frozen=median / frozen if frozen else None,
            removed=removed(seconds, name),
            roofline=median / bounds[name],
        )
    return rows


def removed(seconds: dict, name: str) -> float | None:
    """Return the removed share of the official overhead; None without a baseline or overhead."""
    try:
        return 1 - harness.overhead_ratio(seconds, name, "official", "frozen")
    except (KeyError, ZeroDivisionError):
        return None


def bound(case: Case, variant: str, peaks: roofline.Peaks, train: bool) -> float:
    """Return the least seconds that the linears need one after the other."""
    work = roofline.linear_step if train else roofline.linear_forward
    rank, size = case.adapter_rank(variant), case.dtype.itemsize
    return sum(
        peaks.bound(work(case.M, each.in_features, each.out_features, rank, size))
        for each in case.block.linears
    )


def running(make, variants: dict[str, nn.Module], failed: dict[str, str], results: Results, **row):
    """Return ``make(module)`` of every variant for which it can be made and called.

    Add a row with the reason for every other variant.
    """
    made, failed = {}, dict(failed)
    for name, module in variants.items():
        if name not in failed:
            try:
                made[name] = make(module)
                made[name]()
            except Exception as error:
                made.pop(name, None)
                failed[name] = said(error)
    for name, why in failed.items():
        results.add(**row, variant=name, failed=why)
    return made


def step(
    case: Case,
    results: Results,
    peaks,
    share: Callable[[], float],
    rounds: int,
    what: str,
    at_least: int = 2,
) -> None:
    """Measure a training step in every variant; ``share()`` returns the seconds, after setup."""
    row = {"what": what, **describe(case)}
    cuda, compiled = case.device.startswith("cuda"), what == "compiled"
    torch._dynamo.reset()
    variants = case.variants(compiled=compiled)
    runs = running(case.step, variants, case.failures(variants), results, **row)
    seconds = share() / (2 if cuda and not compiled else 1)
    how = {"device": case.device, "at_most": seconds, "at_least": at_least, "cold": True}
    times = harness.interleaved(runs, rounds, **how)
    bounds = {name: bound(case, name, peaks, train=True) for name in runs}
    rows = add_times(results, times, bounds, **row)
    for name, run in runs.items():
        # Hooks would make a compiled graph compile again.
        saved = None if name == "compiled" else saved_bytes(case, variants[name], run)
        results.extend(rows[name], saved=saved, peak=peak_bytes(case, variants[name], run))
        if cuda:
            results.extend(rows[name], host_us=1e6 * harness.host_seconds(run))
    if not cuda or compiled:
        return
    graphs = {}
    for name, run in runs.items():
        try:
            graphs[name] = replay(run, same=not case.dropout)
        except Exception as error:
            results.extend(rows[name], no_graph=said(error))
    times = harness.interleaved(graphs, rounds, **how)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, value in middle.items():
        over = value / middle["frozen"] if "frozen" in middle else None
        results.extend(rows[name], graph_us=1e6 * value, graph_over_frozen=over)


def decode(case: Case, results: Results, peaks, share: Callable[[], float], rounds: int) -> None:
    """Measure a forward without grad: called, and on a CUDA device replayed."""
    variants = {name: module.eval() for name, module in case.variants().items()}
    failed = case.failures(variants)
    cuda = case.device.startswith("cuda")
    seconds = share() / (1 + cuda)
    for graph in (False, True)[: 1 + cuda]:
        kind = "decode as a graph, which packs in each replay" if graph else "decode"
        row = {"what": kind, **describe(case)}

        def make(module: nn.Module, graph: bool = graph):
            return replay(case.forward(module)) if graph else case.forward(module)

        runs = running(make, variants, failed, results, **row)
        times = harness.interleaved(runs, rounds, device=case.device, at_most=seconds, cold=True)
        bounds = {name: bound(case, name, peaks, train=False) for name in runs}
        add_times(results, times, bounds, **row)


def replay(run: Callable[[], list[torch.Tensor]], same: bool = True) -> Callable[[], None]:
    """Capture ``run`` as a CUDA graph, and return a function that replays it.

    Unless the step draws random numbers, a replay must return the ``same`` results.
    """
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
    for found, value in zip(captured, expected, strict=True) if same else ():
        error = harness.relative_error(found, value)
        if not error <= 2e-2:
            raise RuntimeError(
                f"a graph's replay differs by {error:.2e} in a result of {tuple(value.shape)}"
            )
    return graph.replay


def describe(case: Case) -> dict:
    dtype = str(case.dtype).removeprefix("torch.")
    size = {"M": case.M, "r": case.rank, "R": case.R, "k": case.k}
    return {"block": case.block.name, "dtype": dtype, **size, "dropout": case.dropout}


def cases(what: list[str], device: str, quick: bool, blocks: list[str]) -> list[tuple]:
    """Return (what, block, M, rank, k, dropout): small ranks first, then large M."""
    named = [BLOCKS[name] for name in blocks]
    # A step takes a CPU seconds at the largest M, and nearly one second at the third largest.
    cuda = device.startswith("cuda")
    tokens = (2, 5, 40) if quick else TOKENS if cuda else TOKENS[:-2]
    found: list[tuple[str, Block, int, int, int, float]] = []
    if "step" in what and (cuda or quick):  # the paper's recipe decides
        largest = sorted(tokens, reverse=True)[: 1 if quick else 2]
        found += [("step", named[0], M, *RANKS[0], 0.05) for M in largest]
    for kind in [kind for kind in ("step", "decode") if kind in what]:
        fitting = [M for M in tokens if (M > 16) == (kind == "step")]
        for (rank, k), M, block in itertools.product(RANKS, sorted(fitting, reverse=True), named):
            if cuda or quick or (rank, k) == RANKS[0] or max(tokens) > M:
                found.append((kind, block, M, rank, k, 0.0))
    found = found[: 2 if quick else None]
    if "compiled" in what:
        found += [("compiled", block, max(tokens), *RANKS[0], 0.0) for block in named]
    if "growth" in what:
        width = named[0].linears[0].in_features
        M = width if quick else 2048
        for layers in (2, 4) if quick else (8, 16, 32, 64, 128):
            found.append(("growth", single(width, width, layers), M, 8, 1, 0.0))
        for k in (8,) if quick else (2, 4, 8):
            found.append(("growth", single(width, width, 4 if quick else 32), M, 8, k, 0.0))
    return found


def main() -> None:
    arguments = parser(__doc__)
    kinds = ["step", "decode", "growth", "compiled"]
    arguments.add_argument("what", nargs="*", choices=kinds, default="step")
    arguments.add_argument("--dtype", nargs="+", default=["bfloat16"])
    arguments.add_argument("--blocks", nargs="+", choices=list(BLOCKS))
    arguments.add_argument("--rounds", type=int)
    given = arguments.parse_args()
    what = [given.what] if isinstance(given.what, str) else given.what
    blocks = given.blocks or default_blocks(given.device, given.quick)
    rounds = given.rounds or (2 if given.quick else 30)
    harness.pin_allocator()
    results = Results(given.json, given.device)
    todo = list(itertools.product(given.dtype, cases(what, given.device, given.quick, blocks)))
    peaks = {
        name: roofline.measure(given.device, getattr(torch, name), given.quick)
        for name in given.dtype
    }
    for name, measured in peaks.items():
        results.add(**measured.row(given.device, name))
    budget = Budget(given.seconds)
    for index, (name, (kind, block, M, rank, k, dropout)) in enumerate(todo):
        if index and budget.left() <= 0:
            results.add(what="not run: out of time", left=len(todo) - index)
            break
        gc.collect()  # frees what the previous case held on the device
        share = partial(budget.share, len(todo) - index)
        # On a CPU a round can take many seconds.
        least = 2 if given.device == "cpu" else rounds if index == 0 else min(rounds, 10)
        try:
            case = Case(block, M, rank, k, getattr(torch, name), given.device, dropout)
            if kind == "decode":
                decode(case, results, peaks[name], share, rounds)
            else:
                step(case, results, peaks[name], share, rounds, kind, least)
        except Exception as error:
            traceback.print_exc()
            results.add(what=kind, block=block.name, M=M, r=rank, failed=said(error))
        finally:
            case = None
    # Baselines may fail, but a whole case, or ours in it, may not.
    bad = [row for row in results.rows if "failed" in row]
    sys.exit(int(any(row.get("variant", "ours").startswith("ours") for row in bad)))


if __name__ == "__main__":
    main()
