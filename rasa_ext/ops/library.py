"""The operator library, to which the compiled kernels register."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves

LIBRARY = torch.library.Library("rasa_ext", "DEF")
OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {}
"""The schema and the fake kernel of every operator. The fake is the PyTorch kernel if possible."""
COMPOSED: set[str] = set()
"""Operators without a compiled kernel: they call torch's kernels on every device."""

# Loading the compiled library registers CUDA kernels for the schemas of this package.
_MODULE = "rasa_ext._C"
# An install without compiled kernels writes the reason here.
_WHY_NOT = Path(__file__).parents[1] / "_no_kernels.txt"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def operator(
    schema: str, fake: Callable[..., Any] | None = None, composed: bool = False
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Define an operator from a PyTorch kernel; the decorated name then calls the operator.

    If no compiled kernel exists, the call skips the dispatcher, which costs several microseconds.
    Under ``torch.compile`` the operator is always called, and is opaque to the compiler. The
    PyTorch kernel runs on every device, and on fake tensors gives shapes, dtypes and strides.

    Args:
        schema: name, arguments and results as ``torch.library`` takes them.
        fake: the fake kernel, if compiled kernels take other inputs or the PyTorch kernel reads
            values.
        composed: whether torch's kernels suffice, so that no kernel is compiled.
    """
    name = schema.partition("(")[0]

    def define(direct: Callable[_P, _R]) -> Callable[_P, _R]:
        shapes = direct if fake is None else fake
        OPERATORS[name] = schema, shapes
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, direct, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LIBRARY.ns}::{name}", shapes, lib=LIBRARY)
        overload: Callable[_P, _R] = getattr(getattr(torch.ops, LIBRARY.ns), name).default
        if composed:
            COMPOSED.add(name)
        elif COMPILED:
            return overload

        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return (overload if is_compiling() else direct)(*args, **kwargs)

        call.__name__, call.__doc__ = name, direct.__doc__
        return warning_once(call) if BROKEN and not composed else call

    return define


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of weight gradients for a computation in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def warning_once(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Warn in the first call with a CUDA tensor that the compiled kernels are missing.

    This is for a library that exists but does not load, such as a build for another CUDA major:
    users expect it to be used, but the operators run without it.
    """

    @functools.wraps(call)
    def checking(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        global _warned
        if not (_warned or is_compiling()):
            tensors = (value for value in tree_leaves(args) if isinstance(value, Tensor))
            if any(tensor.is_cuda for tensor in tensors):
                _warned = True
                warnings.warn(cuda_status(), RuntimeWarning, stacklevel=2)
        return call(*args, **kwargs)

    return checking


_warned = False


def _load() -> tuple[bool, bool, str]:
    """Return whether the library is loaded, whether it exists but fails to load, and the reason."""
    if os.environ.get("RASA_EXT_CUDA") == "0":
        return False, False, "RASA_EXT_CUDA=0 turns the compiled library off"
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        why = f" ({_WHY_NOT.read_text().strip()})" if _WHY_NOT.exists() else ""
        return False, False, f"this install has no compiled kernels{why}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return False, True, f"the compiled library {spec.origin} does not load ({error})"
    return True, False, f"the compiled library {spec.origin} is loaded"


COMPILED, BROKEN, _REASON = _load()


def cuda_status() -> str:
    """Return one sentence that says whether the CUDA kernels are in use, and if not, why.

    Returns:
        The sentence, for people to read; code should not depend on the wording.

    Example:
        >>> rasa_ext.cuda_status()
        'CUDA kernels are ...'
    """
    reason = _REASON if BROKEN or torch.cuda.is_available() else "torch sees no CUDA device"
    if not (COMPILED and torch.cuda.is_available()):
        return f"CUDA kernels are not in use: {reason}; every operator runs as PyTorch operations."
    return f"CUDA kernels are in use on {torch.cuda.get_device_name()}: {_REASON}."
