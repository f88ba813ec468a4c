"""Run worker scripts in several processes, and compare the adapters that they write."""

from __future__ import annotations

import functools
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

WORKERS = Path(__file__).parents[1] / "workers"
PARITY = 1e-6
"""Largest difference in float32 between a training in one process and in two."""


MEET = ("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")
"""torchrun's options for two processes."""


def launch(python: Path, launcher: str, worker: str, directory: Path, *options: str) -> str:
    """Run a script of tests/workers under ``launcher``, and return the printed text.

    ``options`` must end with the launcher's port option; a free port is appended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [python, "-m", launcher, *options, str(port), WORKERS / worker, directory],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(python: Path, worker: str, directory: Path) -> Path:
    """Run a script under torchrun in two processes; return the folder that it writes to."""
    launch(python, "torch.distributed.run", worker, directory, *MEET)
    return directory


def refuse_views() -> None:
    """Make collectives refuse tensors that are not contiguous, as NCCL does and gloo does not."""
    for name in ("broadcast", "all_reduce"):
        setattr(dist, name, _refusing(getattr(dist, name)))


def _refusing(collective: Callable) -> Callable:
    @functools.wraps(collective)
    def wrapper(tensor: Tensor, *args, **options):
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
        return collective(tensor, *args, **options)

    return wrapper


def adapter_difference(one: Path, two: Path) -> float:
    """Check that two adapters' files differ only in values; return the largest difference."""
    config = "adapter_config.json"
    assert (one / config).read_bytes() == (two / config).read_bytes()
    a, b = (load_file(directory / "adapter_model.safetensors") for directory in (one, two))
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype for key in a)
    return max((a[key] - b[key]).abs().max().item() for key in a if a[key].numel())
