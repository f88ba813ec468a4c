"""Where the time of a training step goes in a layer's linears: frozen, official formula, ours.

    python -m benchmarks.profile [--device cuda] [--out DIR]     (or benchmarks/profile.sh)

For each variant, writes torch.profiler's table (.txt) and chrome trace (.trace.json). For all
variants, writes the parts of a step and its launches as .json, and the parts as stacked bars
(.png). Operators of rasa_ext are ranges with their names, also for nsys. Under nsys, ``--nsys``
only runs the steps, with NVTX ranges.

The shapes of an operation's arguments decide its part. A product with the rank as one side is the
adapter's, any other product the base's. Other operations with a side of M are passes over tokens;
the rest is weight space. Compiled kernels compute base and adapter in one operator, which is a
separate part.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import harness, records
from benchmarks.linears import Case
from benchmarks.shapes import BLOCKS, RANKS, default_blocks
from rasa_ext import ops

BASELINES = ("frozen", "official")
PARTS = (
    "base products",
    "base and adapter in one operator",
    "adapter products",
    "passes over tokens",
    "weight space: concatenate, cast, scale, sum",
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear")


@contextlib.contextmanager
def named_ranges() -> Iterator[None]:
    """Make each call of a rasa_ext operator within the context a range with its name."""
    before = {name: getattr(ops, name) for name in ops.OPERATORS}

    def ranged(name: str, function):
        def call(*args):
            with torch.profiler.record_function(f"rasa_ext.{name}"):
                return function(*args)

        return call

    try:
        for name, function in before.items():
            setattr(ops, name, ranged(name, function))
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def part(name: str, shapes: list, M: int, ranks: set[int]) -> str:
    """Return the one of PARTS that an operation belongs to."""
    sides = {n for shape in shapes if isinstance(shape, list | tuple) for n in shape}
    ours = ("rasa_ext::low_rank", "rasa_ext::linear_projections", "rasa_ext::adapted_linear")
    if name.startswith(ours):
        return PARTS[1]
    if name in PRODUCTS:
        return PARTS[2] if sides & ranks else PARTS[0]
    return PARTS[3] if M in sides else PARTS[4]


def profiled(run, device: str, steps: int):
    """Run ``steps`` steps under torch.profiler, after two to warm up."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(2):
        run()
    with (
        named_ranges(),
        torch.profiler.profile(activities=kinds, record_shapes=True) as profile,
    ):
        for _ in range(steps):
            with torch.profiler.record_function("step"):
                run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    return profile


def parts_of(profile, case: Case, steps: int) -> dict[str, float]:
    """Return microseconds per step by part: kernels on a GPU, operations' self time on a CPU."""
    cuda = case.device.startswith("cuda")
    padded = ops.rank_multiple(case.device)
    ranks = {case.R, -(-case.R // padded) * padded}
    ranks |= {n * rank for rank in ranks for n in (2, 3)}  # gate and up; q, k and v
    found: dict[str, float] = defaultdict(float)
    for event in profile.events():
        # Autograd's own events cover Python code, which is no operation.
        if not event.name.startswith(("aten::", "rasa_ext::")):
            continue
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        if took:
            found[part(event.name, event.input_shapes or [], case.M, ranks)] += took / steps
    return {name: found.get(name, 0.0) for name in PARTS}


def launches(profile, steps: int) -> int:
    """Return how many kernels, copies and fills a step starts on the device."""
    on_device = torch.autograd.DeviceType.CUDA
    # The profiler lists ranges of record_function on the device as well.
    own = [each for each in profile.events() if each.device_type == on_device]
    ranges = [each for each in own if each.name == "step" or each.name.startswith("rasa_ext.")]
    return (len(own) - len(ranges)) // steps


def draw(
    parts: dict[str, dict[str, float]], wall: dict[str, float], title: str, path: Path
) -> None:
    """Draw a bar of stacked parts for each variant; a dash marks the measured time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    names, below = list(parts), dict.fromkeys(parts, 0.0)
    for label in PARTS:
        heights = [parts[name][label] / 1e3 for name in names]
        if any(heights):
            axes.bar(names, heights, bottom=[below[name] for name in names], label=label, width=0.6)
        for name, height in zip(names, heights, strict=True):
            below[name] += height
    times = [1e3 * wall[name] for name in names]
    axes.scatter(names, times, marker="_", s=900, color="black", label="step, not profiled")
    axes.set(ylabel="milliseconds a step", title=title)
    axes.title.set_size(8)
    axes.legend(fontsize=8, markerscale=0.4, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def nsys_steps(runs: dict, steps: int) -> None:
    """Run steps under NVTX ranges, for nsys around this process."""
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    with named_ranges(), torch.autograd.profiler.emit_nvtx():
        for name, run in runs.items():
            for _ in range(steps):
                with torch.profiler.record_function(f"step {name}"):
                    run()
    torch.cuda.synchronize()


def profile_all(runs: dict, case: Case, steps: int, out: Path) -> None:
    """Write tables, traces, parts and the picture of all variants."""
    cuda = case.device.startswith("cuda")
    times = harness.interleaved(runs, rounds=max(steps, 2), device=case.device)
    wall = {name: statistics.median(values) for name, values in times.items()}
    parts: dict[str, dict[str, float]] = {}
    launched: dict[str, int | None] = {}
    for name, run in runs.items():
        profile = profiled(run, case.device, steps)
        parts[name] = parts_of(profile, case, steps)
        launched[name] = launches(profile, steps) if cuda else None
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        averages = profile.key_averages()
        (out / f"{name}.txt").write_text(averages.table(sort_by=order, row_limit=40))
        profile.export_chrome_trace(str(out / f"{name}.trace.json"))
    head = records.environment(case.device)
    rows = [
        {"variant": name, "step_us": 1e6 * wall[name], "launches": launched[name], **parts[name]}
        for name in parts
    ]
    case_of = f"{case.block.name}, M={case.M}, R={case.R}, {case.dtype}".replace("torch.", "")
    records.write_json(out / "profile.json", {"machine": head, "case": case_of, "rows": rows})
    print(case_of, records.table(rows), sep="\n\n")
    title = f"Linears of a layer of {case_of}\n{head['card'] or head['host']}"
    try:
        draw(parts, wall, title, out / "step.png")
    except ImportError as missing:
        print(f"no picture: {missing}")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--block", choices=list(BLOCKS))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/profile"))
    parser.add_argument("--nsys", action="store_true", help="only run steps, for use under nsys")
    given = parser.parse_args()
    on_gpu = given.device.startswith("cuda")
    block: str = given.block or default_blocks(given.device, quick=False)[0]
    dtype = getattr(torch, given.dtype or ("bfloat16" if on_gpu else "float32"))
    tokens = given.tokens or (8192 if on_gpu else 512)
    case = Case(BLOCKS[block], tokens, *RANKS[0], dtype, given.device)
    made = case.variants()
    variants = {name: made[name] for name in (*BASELINES, case.ours)}
    case.verify(variants)
    runs = {name: case.step(module) for name, module in variants.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    if given.nsys:
        nsys_steps(runs, given.steps)
    else:
        profile_all(runs, case, given.steps, given.out)


if __name__ == "__main__":
    main()
