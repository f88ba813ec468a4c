"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> dict[str, int]:
    """Peak bytes so far: `rss_bytes` of the process, and `cuda_bytes` where there is a GPU.

    The resident set counts the libraries and everything the process ever held at once.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    peak = {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def describe_memory(peak: dict[str, int]) -> str:
    """Such as `1.53 GiB resident, 0.80 GiB on the GPU`."""
    text = f"{peak['rss_bytes'] / 2**30:.2f} GiB resident"
    if "cuda_bytes" in peak:
        text += f", {peak['cuda_bytes'] / 2**30:.2f} GiB on the GPU"
    return text
