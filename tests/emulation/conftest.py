"""Builds the emulated kernels once a session."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.register_assert_rewrite("emulated")

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def emulation_build() -> Path:
    """The build folder of CMakeLists.txt, up to date. It stays between sessions."""
    beside_python = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("the emulated kernels are built by cmake and pybind11; install both")
    folder = ROOT / "build" / "emulation"
    _run(cmake, "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}")
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    _run(cmake, "--build", folder, "--parallel", jobs)
    return folder


@pytest.fixture(scope="session")
def kernels(emulation_build: Path) -> ModuleType:
    """The emulated launchers of csrc/launchers.h."""
    (path,) = (emulation_build / "tests" / "emulation").glob("rasa_emulated.*.so")
    spec = importlib.util.spec_from_file_location("rasa_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
