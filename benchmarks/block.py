"""The linears of a decoder layer: what adapters add to a training step and to decoding.

    python -m benchmarks.block [step] [decode] [growth] [compiled] [--device cuda] [--json FILE]

Every variant runs over the same weights, checked to be one function where it should be. One that
is not, or that raises, leaves a row that says why, and the others are measured. Columns:

- over_frozen: the variant's time over that of the frozen linears;
- removed: (official - variant) / (official - frozen), the share of the official overhead removed,
  of the medians of the differences by round;
- roofline: the variant's time over the bound of its bytes and FLOPs (benchmarks.roofline);
- saved: bytes kept for the backward, parameters left out; peak: bytes above what was held before;
- host_us: until the host has launched a step; graph_us: the step replayed as a CUDA graph, which
  no host holds up. Both on a CUDA device alone.

``ours, cublas`` is ours without the kernels of csrc/cuda/skinny.cuh (RASA_EXT_KERNELS=cublas).
``step`` has its largest shapes with dropout 0.05 first, and then all without.
``decode`` is a forward without grad of M = 1 and 16 tokens, as it is and replayed as a CUDA graph.
Layers pack in every replay, since a replay sees the present parameters.
``growth`` is the step of one linear while the model's layers, or k, become more.
``compiled`` is the step of the largest M with torch.compile's version of the official formula.
The most telling case comes first and gets all its rounds; the others share what is left of the
time, and its end ends the list. The exit status is 1 if ours failed anywhere.
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


def add_times(results: Results, seconds: dict, bounds: dict[str, float], **case) -> dict[str, dict]:
    """A row a variant, by its name."""
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
    """The share of the official overhead; None where a baseline is missing or there is none."""
    try:
        return 1 - harness.overhead_ratio(seconds, name, "official", "frozen")
    except (KeyError, ZeroDivisionError):
        return None


def bound(case: Case, variant: str, peaks: roofline.Peaks, train: bool) -> float:
    """Seconds that the linears need one after the other."""
    work = roofline.linear_step if train else roofline.linear_forward
    rank, size = case.adapter_rank(variant), case.dtype.itemsize
    return sum(
        peaks.bound(work(case.M, each.in_features, each.out_features, rank, size))
        for each in case.block.linears
    )


def running(make, variants: dict[str, nn.Module], failed: dict[str, str], results: Results, **row):
    """``make(module)`` of every variant that gets through it; why the others do not, as rows."""
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
    """A training step in every variant; ``share()`` tells the seconds when all is set up."""
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
    """A forward without grad: called, and on a CUDA device replayed."""
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
    """``run`` captured once; what is returned replays it.

    Unless the step draws something, a replay must give the ``same`` results.
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
                f"a replay is off by {error:.2e} in a result of {tuple(value.shape)}"
            )
    return graph.replay


def describe(case: Case) -> dict:
    dtype = str(case.dtype).removeprefix("torch.")
    size = {"M": case.M, "r": case.rank, "R": case.R, "k": case.k}
    return {"block": case.block.name, "dtype": dtype, **size, "dropout": case.dropout}


def cases(what: list[str], device: str, quick: bool, blocks: list[str]) -> list[tuple]:
    """(what, block, M, rank, k, dropout): the largest M and smallest rank of each block first."""
    named = [BLOCKS[name] for name in blocks]
    # A CPU takes seconds for a step of the largest M, and nearly one for the third.
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
    budget = Budget(given.seconds)
    for index, (name, (kind, block, M, rank, k, dropout)) in enumerate(todo):
        if index and budget.left() <= 0:
            results.add(what="not run: out of time", left=len(todo) - index)
            break
        gc.collect()  # what the case before held on the device
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
    # Baselines may fail; a case, or ours in it, may not.
    bad = [row for row in results.rows if "failed" in row]
    sys.exit(int(any(row.get("variant", "ours").startswith("ours") for row in bad)))


if __name__ == "__main__":
    main()
