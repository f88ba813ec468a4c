"""``rasa-ext env``."""

from __future__ import annotations

import importlib.metadata
import platform

from rasa_ext import __version__
from rasa_ext.commands.output import command, console, pairs_of

_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "gguf"),
    *("datasets", "trl", "bitsandbytes"),
)


@command
def env() -> None:
    """Print versions, devices, and the kernels in use, with the reason."""
    import torch

    from rasa_ext import cuda_status

    rows = {
        "rasa_ext": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: _version(package) for package in _PACKAGES},
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.version.cuda or "torch is built without it",
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows[f"gpu {i}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"
    console.print(pairs_of({**rows, "kernels": cuda_status()}))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
