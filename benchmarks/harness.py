"""Timing for every benchmark: variants interleaved in one process, medians with quartiles.

Ratios are taken between variants of the same run, since machines drift; nothing here judges.
"""

from __future__ import annotations

import ctypes
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


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
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; every round runs all of them in a random order."""
    order, generator = list(variants), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(warmup + rounds):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            variants[name]()
            if done >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def overhead_ratio(
    seconds: Mapping[str, list[float]], ours: str, official: str, frozen: str
) -> float:
    """(ours - frozen) / (official - frozen) of the medians: below 1 where ours costs less."""
    middle = {name: statistics.median(seconds[name]) for name in (ours, official, frozen)}
    return (middle[ours] - middle[frozen]) / (middle[official] - middle[frozen])


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
