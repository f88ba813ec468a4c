"""The host code over its stand-ins: operators of another namespace, or the package's own."""

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
    """Builds it where it is not up to date. Once a process: a namespace is defined once."""
    return Host(compiled.build("rasa_host_ops") / "tests" / "host" / "librasa_host_ops.so")


class Host:
    """``torch.ops.rasa_ext_host``, and what its cuBLAS was asked for."""

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
        """What cublasLt was asked to choose algorithms for since the last look."""
        return self._standin.asked_heuristics().decode().splitlines()

    def math_mode(self) -> int:
        return self._standin.current_math_mode()

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The package's operators become the compiled ones, with a GPU's heuristics."""
        heuristics = {
            "rank_multiple": lambda _: 16,
            "fuse_projections": lambda *_: False,
            "noise_words": lambda *_: 2,
        }
        compiled_ones = {name: getattr(self.ops, name).default for name in self.names}
        for name, its in {**compiled_ones, **heuristics}.items():
            monkeypatch.setattr(ops, name, its)
        # Where fake kernels see tensors of a CPU, U would have other strides.
        module = sys.modules["rasa_ext.ops.dropout"]  # the package has an operator of that name
        monkeypatch.setattr(module, "ranks_first", lambda *_: False)

    def refused(self) -> int:
        """How many products cublasLt had an algorithm for, but would not run."""
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
        """cublasLt refuses meanwhile; ``how`` is one of standin/cublasLt.cpp's ``Refusal``."""
        self._standin.refuse_products(how)
        try:
            yield
        finally:
            self._standin.refuse_products(0)
