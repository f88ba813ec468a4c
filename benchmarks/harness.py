"""Timing for every benchmark: variants interleaved in one process, medians with quartiles.

Ratios are taken between variants of the same run, since machines drift. Nothing here judges a
result.

On a CUDA device, events on the stream time a call. Before each call the L2 cache is overwritten,
then written back by reading other memory, and the device is idle. Launches that the host makes too
slowly therefore count, unless ``hide_launches`` makes the device wait for them. On a CPU, only
``cold`` overwrites the caches.
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
_CYCLES = 2e9  # a second of a device's clock; a slower clock only waits longer


def pin_allocator() -> None:
    """Keep glibc from returning memory between steps, as heap history would change times."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # 32 MiB is the largest threshold that glibc accepts.
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
    """Return the seconds of each variant by round; a round runs all variants in random order.

    After ``at_most`` seconds no further round starts, except one to warm up and ``at_least`` to
    time. On a CUDA device, ``hide_launches`` makes the device wait while the host launches, so that
    only the kernels are timed; this covers up to the thousand launches that a device queues. On a
    CPU, ``cold`` overwrites the caches before every call.
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
    """Return the size of the CPU's last cache, or 32 MiB if the system does not say."""
    names = ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE")
    known = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return max((size for size in known if size > 0), default=32 << 20)


def _cuda_timer(hide_launches: bool) -> Callable[[Callable[[], object]], float]:
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    cache, other = torch.zeros(2, max(size, 1 << 20) // 8, dtype=torch.int64, device="cuda")
    launching: dict[Callable[[], object], float] = {}  # the host's seconds in the last call

    def seconds(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cache.zero_()
        other.sum()  # or else the zeros are written back during the timed call
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
    """Return the median seconds that the host takes to launch all of a call's work on CUDA."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of norms; NaN if any value is NaN."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def overhead_ratio(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str
) -> float:
    """Return the overhead of ours over the overhead of official: below 1 if ours costs less.

    Each overhead is a median of differences to frozen by round, so that a slow phase of the machine
    affects all three variants alike.
    """
    return _ratio(_differences(seconds, ours, official, frozen))


def overhead_interval(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str, draws: int = 2000
) -> tuple[float, float]:
    """Return the 90 % interval of ``overhead_ratio``, from resampled rounds (bootstrap)."""
    rounds = _differences(seconds, ours, official, frozen)
    generator = random.Random(0)
    found = sorted(_ratio(generator.choices(rounds, k=len(rounds))) for _ in range(draws))
    return found[draws // 20], found[-(draws // 20) - 1]


def _differences(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str
) -> list[tuple[float, float]]:
    """Return what ours and official add to frozen, by round."""
    columns = (seconds[name] for name in (ours, official, frozen))
    return [(mine - low, its - low) for mine, its, low in zip(*columns, strict=True)]


def _ratio(rounds: list[tuple[float, float]]) -> float:
    mine, its = zip(*rounds, strict=True)
    return statistics.median(mine) / statistics.median(its)


def machine() -> str:
    """Describe the device and versions, for the head of every report."""
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
