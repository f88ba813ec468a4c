"""The least time that work can take: bytes at copy speed, or FLOPs at the speed of a large GEMM.

Both speeds are measured on the present device, so the bound is valid for the card, clocks and power
limit of the run. ``time / bound`` is 1 for work that is as fast as the device allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness


@dataclass(frozen=True)
class Work:
    """Bytes that must cross the memory bus once, and floating-point operations."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Peaks:
    """Bytes per second, and floating-point operations per second."""

    bandwidth: float
    flops: float

    def bound(self, work: Work) -> float:
        """Return the least seconds that the work takes."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops)

    def best(self, other: Peaks) -> Peaks:
        """Return the higher value of each."""
        return Peaks(max(self.bandwidth, other.bandwidth), max(self.flops, other.flops))

    def row(self, device: str, dtype: str) -> dict[str, Any]:
        """Return the row of a report that says what was measured, with the size of the L2 cache."""
        cuda = device.startswith("cuda")
        return {
            "what": "peaks",
            "dtype": dtype,
            "copy_gb_s": self.bandwidth / 1e9,
            "gemm_tflop_s": self.flops / 1e12,
            "l2_mb": torch.cuda.get_device_properties(device).L2_cache_size / 1e6 if cuda else 0,
        }


def measure(device: str, dtype: torch.dtype, quick: bool = False) -> Peaks:
    """Measure copy bandwidth (reads plus writes) and GEMM rate in ``dtype``; upper quartiles."""
    cuda = device.startswith("cuda")
    size = (1 << 20) if quick else (1 << 28) if cuda else (1 << 26)
    width = 256 if quick else 8192 if cuda and dtype.itemsize < 4 else 4096 if cuda else 1024
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = harness.interleaved(
        {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(left, right, out=product)},
        rounds=5 if quick else 20,
        device=device,
        hide_launches=True,
    )
    best = {name: harness.quartiles(values)[0] for name, values in seconds.items()}
    return Peaks(2 * size / best["copy"], 2 * width**3 / best["gemm"])


def linear_forward(M: int, width: int, out: int, rank: int, size: int) -> Work:
    """Return the work of y = x W^T + (x Ap^T) Bp^T.

    x, W and the factors are read and y is written; U stays on chip.
    """
    numbers = M * (width + out) + width * out + rank * (width + out)
    return Work(size * numbers, 2 * M * width * out + 2 * M * rank * (width + out))


def linear_step(M: int, width: int, out: int, rank: int, size: int) -> Work:
    """Return the work of a forward, dx, and the gradients of an adapter, which are float32.

    With ``rank`` 0 there is no adapter.
    """
    numbers = M * (width + out) + width * out + (M * width if rank else 0)
    factors = rank * (width + out)
    backward = Work(
        size * (numbers + factors) + 4 * factors,
        2 * M * width * out + 4 * M * rank * (width + out),
    )
    return linear_forward(M, width, out, rank, size) + backward
