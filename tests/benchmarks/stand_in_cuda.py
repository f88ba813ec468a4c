"""A fake CUDA device: calls that name it run on the CPU, and torch.cuda reports that it exists.

``program`` returns a Python to start instead of ``sys.executable``; its processes have the device.
Code for a GPU then runs from end to end. That tests neither kernels nor memory nor speed.

With STAND_IN_KERNELS=1 in the environment, every operator reports a compiled kernel, and setup.py
succeeds. Without it none does, and setup.py fails, whatever torch is installed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rasa_ext import ops
from tests.helpers import forked

PYTHON, KERNELS = "STAND_IN_PYTHON", "STAND_IN_KERNELS"


def program(forked_python: Path, folder: Path) -> Path:
    """Write a Python program whose processes have the device, and return the path."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\n{PYTHON}={path} exec {forked_python} -m tests.benchmarks.stand_in_cuda "$@"\n'
    )
    path.chmod(0o755)
    return path


class OnCpu(TorchFunctionMode):
    """A mode that replaces CUDA devices by the CPU in the arguments of every call."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
        if "out_dtype" in kwargs:  # the CPU has no product with another output dtype
            wide = kwargs.pop("out_dtype")
            args = [each.to(wide) for each in args]
        return function(*map(here, args), **kwargs)


def here(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class CUDAGraph:
    """A graph without a replay: the capture itself has computed the results in their place."""

    def replay(self) -> None: ...


NAME = "NVIDIA Stand-in"
PROPERTIES = SimpleNamespace(
    name=NAME, multi_processor_count=1, total_memory=2**30, major=9, minor=0, L2_cache_size=1024
)
ANSWERS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: NAME,
    "get_device_properties": lambda *_: PROPERTIES,
    "synchronize": lambda *_: None,
    "_sleep": lambda cycles: None,
    "Event": Event,
    "Stream": Stream,
    "current_stream": lambda *_: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": CUDAGraph,
    "graph": lambda graph: contextlib.nullcontext(),
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 1,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "mem_get_info": lambda *_: (2**30, 2**30),
    "cudart": lambda: SimpleNamespace(cudaProfilerStart=int, cudaProfilerStop=int),
}


def install() -> None:
    """Install the device for the rest of the process."""
    for attribute, value in ANSWERS.items():
        assert hasattr(torch.cuda, attribute)
        setattr(torch.cuda, attribute, value)
    profile = torch.profiler.profile
    torch.profiler.profile = lambda activities, **how: profile(activities=activities[:1], **how)
    OnCpu().__enter__()
    ops.fuse_projections = lambda _: True
    compiled = bool(os.environ.get(KERNELS))
    torch._C._dispatch_has_kernel_for_dispatch_key = lambda *_: compiled
    if not compiled:
        os.environ["CUDA_HOME"] = "/nonexistent"  # which no build accepts


def main() -> None:
    install()
    words, sys.executable = sys.argv[1:], os.environ[PYTHON]
    if words[0] == "setup.py" and os.environ.get(KERNELS):
        print("compiled, one would think")
        return
    forked._run(words, os.getcwd(), dict(os.environ))


if __name__ == "__main__":
    main()
