"""Finds the compiled kernels, and says in one sentence whether they are in use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# The compiled library registers CUDA kernels for the schemas of this package when it is loaded.
_MODULE = "rasa_ext._C"
# Written by an install without it: why.
_WHY_NOT = Path(__file__).parents[1] / "_no_kernels.txt"


def _load() -> tuple[bool, str]:
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        why = f" ({_WHY_NOT.read_text().strip()})" if _WHY_NOT.exists() else ""
        return False, f"this install has no compiled kernels{why}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return False, f"the compiled library {spec.origin} does not load ({error})"
    return True, f"the compiled library {spec.origin} is loaded"


COMPILED, _REASON = _load()


def cuda_status() -> str:
    """One sentence: whether the CUDA kernels are in use, and if not, why not."""
    if not COMPILED:
        return f"CUDA kernels are not in use: {_REASON}; every operator runs as PyTorch operations."
    if not torch.cuda.is_available():
        return f"CUDA kernels are not in use: {_REASON}, but torch sees no CUDA device."
    return f"CUDA kernels are in use on {torch.cuda.get_device_name()}: {_REASON}."
