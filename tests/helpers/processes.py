"""Run worker scripts in several processes, and compare the adapters that they write."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

WORKERS = Path(__file__).parents[1] / "workers"
PARITY = 1e-6
"""Largest difference in float32 between a training in one process and in two."""


def run_whole(command: Sequence[str | Path], **options: Any) -> str:
    """Run a command, and return what it printed. No process of it outlives the call.

    Fails if the command fails or takes longer than ten minutes. The text goes to a file: a pipe
    would stay open as long as a grandchild runs.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        try:
            code = process.wait(600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        text = said.read()
    assert code == 0, f"{command}\n{text}"
    return text


def accelerate(python: Path, worker: str, directory: Path, *options: str) -> None:
    """Run a script of tests/workers under ``accelerate launch``, in two processes."""
    with socket.socket() as free:  # accelerate's launcher cannot choose a port as it binds it
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1")
    meet = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    run_whole([python, *launcher, *options, *meet, WORKERS / worker, directory])


def torchrun(python: Path, worker: str | Path, directory: Path, *arguments: str) -> str:
    """Run a script of tests/workers under torchrun in two processes; return what it printed.

    torchrun binds a free port of its own.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return run_whole([python, *launcher, WORKERS / worker, directory, *arguments])


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
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (one, two)]
    for each in configs:  # PEFT writes a set
        each["target_modules"] = sorted(each["target_modules"])
    assert configs[0] == configs[1]
    a, b = (load_file(directory / "adapter_model.safetensors") for directory in (one, two))
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype for key in a)
    return max((a[key] - b[key]).abs().max().item() for key in a if a[key].numel())


def check_parity(name: str, steps: tuple, clip: float, one: Path, two: Path, figure) -> float:
    """Check that two processes trained like one; return the largest difference.

    ``steps`` are losses and gradient norms of one process; ``one`` and ``two`` have the adapters.
    """
    (losses, norms), (losses_of_two, norms_of_two) = steps, torch.load(two / "steps.pt")
    apart = {
        "losses": (losses_of_two - losses).abs().max().item(),
        "adapter": adapter_difference(one, two),
        "gradient norms, relative": (norms_of_two / norms - 1).abs().max().item(),
    }
    figure(f"{name}: two processes differ by {apart}")
    assert losses[0] > losses[-1]
    assert norms.max() > clip
    assert all(value <= PARITY for value in apart.values()), apart
    return max(apart.values())
