"""Declares the compiled library: one file for every torch from 2.10 on and every Python from 3.10.

It uses nothing but torch's stable ABI and has no Python module in it, so neither version is part of
its name or of its symbols; one build serves one CUDA major.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from build_support.toolchain import Toolchain, supported_archs

# Hopper's and Blackwell's 100 and 120 share no binary with each other; the PTX serves what follows.
ARCHS = ("8.0", "9.0", "10.0", "12.0")
TARGET = "0x020a000000000000"  # the oldest torch that the library runs under: 2.10
DEFINES = [f"-DTORCH_TARGET_VERSION={TARGET}", "-DUSE_CUDA"]
PYTHON = "cp311"


def sources(root: Path) -> list[str]:
    """Every file that is compiled, relative to ``root``."""
    # Paths must be relative to setup.py, or they end up in the build folder's layout.
    found = [*root.glob("csrc/*.cpp"), *root.glob("csrc/*.cu"), *root.glob("csrc/cuda/*.cu")]
    return sorted(str(path.relative_to(root)) for path in found)


def arguments(found: Toolchain, root: Path) -> dict:
    """``ext_modules``, ``cmdclass`` and ``options`` for ``setup``, run from ``root``."""
    _use(found)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    library = CUDAExtension(
        "rasa_ext._C",
        sources(root),
        include_dirs=[str(root / "csrc")],
        depends=sorted(str(path) for path in root.glob("csrc/**/*.*h")),
        extra_compile_args={
            # Last of all include folders, so that only cuBLAS comes from it.
            "cxx": ["-O2", *warnings, *DEFINES, "-idirafter", str(found.cublas_include)],
            "nvcc": ["-O3", "--ptxas-options=-v", *DEFINES],
        },
        extra_link_args=[
            argument
            for library in found.cublas_libraries
            for argument in (f"-L{library.parent}", f"-l:{library.name}")
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON}},
    }


def _use(found: Toolchain) -> None:
    """Makes torch importable and sets what its build code reads, unless the user has set it."""
    if str(found.site_packages) not in sys.path:
        sys.path.append(str(found.site_packages))
    os.environ.setdefault("CUDA_HOME", str(found.cuda_home))
    # Left to itself torch would look for visible GPUs.
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = supported_archs(found.cuda_home, ARCHS)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    # A ninja of the environment built for is used even where the build's own environment has none.
    scripts = found.site_packages.parents[2] / "bin"
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(scripts)))
