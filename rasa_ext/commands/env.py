"""``rasa-ext env``."""

from __future__ import annotations

import importlib.metadata
import platform

from rich.table import Table

from rasa_ext import __version__
from rasa_ext.commands.output import command, console

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "gguf",
    "datasets",
    "trl",
    "bitsandbytes",
)


@command
def env() -> None:
    """Print versions, devices, and which kernels are in use and why."""
    import torch

    from rasa_ext import cuda_status

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("rasa_ext", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    table.add_row(
        "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    table.add_row("cuda", torch.version.cuda or "torch is built without it")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            table.add_row(
                f"gpu {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            )
    else:
        table.add_row("gpu", "none")
    table.add_row("kernels", cuda_status())
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
