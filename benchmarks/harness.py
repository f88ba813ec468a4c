"""Timing for every benchmark: variants interleaved in one process, medians with quartiles.

Ratios are taken between variants of the same run, since machines drift; nothing here judges.

On a CUDA device a call is timed by events on its stream. Before each one the L2 cache is
overwritten, and written back by reading other memory, and the device is idle, so that launches
which the host cannot make in time count, unless ``hide_launches`` has it wait for them. On a CPU
the caches are overwritten where that is asked for (``cold``).
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_CYCLES = 2e9  # a second of a device's clock; a slower one only waits longer


def pin_allocator() -> None:
    """Keep glibc from handing memory back between steps, so that heap history is not timed."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # 32 MiB is the largest threshold that glibc takes.
        if not (
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25) and libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        ):
            raise OSError("mallopt refused the thresholds")


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    seed: int = 0,
    *,
    device: str = "cpu",
    at_most: float = math.inf,
    at_least: int = 2,
    hide_launches: bool = False,
    cold: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; every round runs all of them in a random order.

    After ``at_most`` seconds no further round begins, save one to warm up and ``at_least`` to time.
    On a CUDA device ``hide_launches`` keeps the device waiting while the host launches, for the
    time of the kernels alone: up to the thousand launches that a device queues. ``cold`` has every
    call on a CPU find its caches overwritten.
    """
    order, generator = list(variants), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    timed = _cuda_timer(hide_launches) if device.startswith("cuda") else _wall_timer(cold)
    end = time.perf_counter() + at_most
    for done in range(warmup + rounds):
        late = time.perf_counter() > end
        if late and 1 <= done < warmup:
            continue
        if late and done >= warmup + at_least:
            break
        generator.shuffle(order)
        for name in order:
            took = timed(variants[name])
            if done >= warmup:
                seconds[name].append(took)
    return seconds


def _wall_timer(cold: bool) -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(2 * _last_cache_bytes(), dtype=torch.int8) if cold else None

    def seconds(call: Callable[[], object]) -> float:
        if cache is not None:
            cache.zero_()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def _last_cache_bytes() -> int:
    """Of the CPU's last cache; 32 MiB where the system does not say."""
    names = ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE")
    known = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return max((size for size in known if size > 0), default=32 << 20)


def _cuda_timer(hide_launches: bool) -> Callable[[Callable[[], object]], float]:
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    cache, other = torch.zeros(2, max(size, 1 << 20) // 8, dtype=torch.int64, device="cuda")
    launching: dict[Callable[[], object], float] = {}  # seconds of the host, last time

    def seconds(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cache.zero_()
        other.sum()  # the zeros would be written back while the call is timed
        if hide_launches:
            torch.cuda._sleep(int(1.5 * launching.get(call, 1e-3) * _CYCLES))
        start.record()
        begin = time.perf_counter()
        call()
        launching[call] = min(time.perf_counter() - begin, 0.05)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def host_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds until a CUDA device has been given all of a call's work."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far off, by norms; NaN where anything is."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def overhead_ratio(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str
) -> float:
    """What ours adds to frozen over what official adds: below 1 where ours costs less.

    Of the medians of the rounds' differences, so that a machine that slows down for some rounds
    does so for all three.
    """
    return _ratio(_differences(seconds, ours, official, frozen))


def overhead_interval(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str, draws: int = 2000
) -> tuple[float, float]:
    """The 90 % interval of ``overhead_ratio``: as if the rounds were drawn again (bootstrap)."""
    rounds = _differences(seconds, ours, official, frozen)
    generator = random.Random(0)
    found = sorted(_ratio(generator.choices(rounds, k=len(rounds))) for _ in range(draws))
    return found[draws // 20], found[-(draws // 20) - 1]


def _differences(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str
) -> list[tuple[float, float]]:
    """What ours and official add to frozen, by round."""
    columns = (seconds[name] for name in (ours, official, frozen))
    return [(mine - low, its - low) for mine, its, low in zip(*columns, strict=True)]


def _ratio(rounds: list[tuple[float, float]]) -> float:
    mine, its = zip(*rounds, strict=True)
    return statistics.median(mine) / statistics.median(its)


def machine() -> str:
    """The device and versions, for the head of every report."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
