"""Builds the host code over its stand-ins, and offers it as operators of another namespace."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rasa_ext.ops import OPERATORS

HERE = Path(__file__).resolve().parent


class Host:
    """``torch.ops.rasa_ext_host``, and what its cuBLAS was asked for."""

    def __init__(self, path: Path) -> None:
        self.library = torch.library.Library("rasa_ext_host", "DEF")
        for name, (schema, kernel) in OPERATORS.items():
            self.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"rasa_ext_host::{name}", kernel, lib=self.library)
        torch.ops.load_library(str(path))
        self.ops = torch.ops.rasa_ext_host
        self._standin = ctypes.CDLL(str(path))
        self._standin.recorded_calls.restype = ctypes.c_char_p

    def reset(self) -> None:
        self._standin.reset_calls()

    def calls(self) -> list[str]:
        return self._standin.recorded_calls().decode().splitlines()

    def math_mode(self) -> int:
        return self._standin.current_math_mode()


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("the host code is compiled with cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("host")
    configure = ["cmake", "-S", HERE, "-B", build, f"-DPython3_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", build, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return Host(build / "librasa_host_ops.so")
