"""Compile the kernels for the CPU, and operators that call them, once for all test workers."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def build(*targets: str) -> Path:
    """Bring CMake ``targets`` up to date and return the build folder, which outlasts the run."""
    beside_python = Path(sys.executable).parent
    programs = f"{beside_python}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = (shutil.which(name, path=programs) for name in ("cmake", "ninja"))
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if None in (cmake, ninja, compiler, importlib.util.find_spec("pybind11")):
        pytest.skip("cmake, ninja, a C++ compiler and pybind11 compile the kernels for the host")
    folder = ROOT / "build" / "host"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same targets
        options = (f"-DPython3_EXECUTABLE={sys.executable}", f"-DRASA_TORCH={torch.__path__[0]}")
        generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")  # make may be missing
        _run(cmake, "-S", ROOT, "-B", folder, *generator, *options)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        _run(cmake, "--build", folder, "--parallel", jobs, "--target", *targets)
    return folder


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout}{done.stderr}"
