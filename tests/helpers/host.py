"""The host code compiled over stand-ins for CUDA and cuBLAS, as operators that run on a CPU.

The operators are in a namespace of their own, or replace the package's.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rasa_ext import ops
from tests.helpers import compiled


def load() -> Host:
    """Build the library if needed, and load it.

    Call this once in a process: a namespace cannot be defined twice.
    """
    return Host(compiled.build("rasa_host_ops") / "tests" / "host" / "librasa_host_ops.so")


class Host:
    """``torch.ops.rasa_ext_host``, and the calls that reached the cuBLAS stand-in."""

    def __init__(self, path: Path) -> None:
        self.library = torch.library.Library("rasa_ext_host", "DEF")
        self.names = ops.OPERATORS.keys() - ops.COMPOSED
        for name in self.names:
            schema, kernel = ops.OPERATORS[name]
            self.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"rasa_ext_host::{name}", kernel, lib=self.library)
        torch.ops.load_library(str(path))
        self.ops = torch.ops.rasa_ext_host
        self._standin = ctypes.CDLL(str(path))
        self._standin.recorded_calls.restype = ctypes.c_char_p
        self._standin.asked_heuristics.restype = ctypes.c_char_p

    def reset(self) -> None:
        self._standin.reset_calls()

    def calls(self) -> list[str]:
        return self._standin.recorded_calls().decode().splitlines()

    def heuristics(self) -> list[str]:
        """Return the products that cublasLt chose algorithms for since the previous call."""
        return self._standin.asked_heuristics().decode().splitlines()

    def math_mode(self) -> int:
        return self._standin.current_math_mode()

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the package's operators by the compiled ones, with the heuristics of a GPU."""
        heuristics = {
            "rank_multiple": lambda _: 16,
            "fuse_projections": lambda *_: False,
            "noise_words": lambda *_: 2,
        }
        compiled_ones = {name: getattr(self.ops, name).default for name in self.names}
        for name, its in {**compiled_ones, **heuristics}.items():
            monkeypatch.setattr(ops, name, its)
        # Fake kernels see CPU tensors, for which U would have other strides.
        module = sys.modules["rasa_ext.ops.dropout"]  # the package has an operator of that name
        monkeypatch.setattr(module, "ranks_first", lambda *_: False)

    def refused(self) -> int:
        """Return how many products cublasLt chose an algorithm for but refused to run."""
        return self._standin.refused_products()

    @contextmanager
    def with_math_mode(self, mode: int) -> Iterator[None]:
        before = self.math_mode()
        self._standin.set_math_mode(mode)
        try:
            yield
        finally:
            self._standin.set_math_mode(before)

    @contextmanager
    def refusing(self, how: int) -> Iterator[None]:
        """Make cublasLt refuse products; ``how`` is a ``Refusal`` of standin/cublasLt.cpp."""
        self._standin.refuse_products(how)
        try:
            yield
        finally:
            self._standin.refuse_products(0)
