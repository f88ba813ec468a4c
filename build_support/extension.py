"""Declare the compiled library.

It uses only torch's stable ABI and contains no Python module. So one build works with torch 2.10
or newer and with any Python from 3.11, for one CUDA major version.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from build_support.toolchain import Toolchain, supported_archs

# 9.0, 10.0 and 12.0 cannot run each other's binaries. PTX is added for newer GPUs.
ARCHS = ("8.0", "9.0", "10.0", "12.0")
TARGET = "0x020a000000000000"  # the oldest torch that the library runs under: 2.10
DEFINES = [f"-DTORCH_TARGET_VERSION={TARGET}", "-DUSE_CUDA"]
PYTHON = "cp311"


def sources(root: Path) -> list[str]:
    """Return the paths of all source files to compile, relative to ``root``."""
    # Relative to setup.py, because absolute paths would become part of the build folder's layout.
    found = [*root.glob("csrc/*.cpp"), *root.glob("csrc/*.cu"), *root.glob("csrc/cuda/*.cu")]
    return sorted(str(path.relative_to(root)) for path in found)


def arguments(found: Toolchain, root: Path) -> dict:
    """Return ``ext_modules``, ``cmdclass`` and ``options`` for ``setup``, run from ``root``."""
    _use(found)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    library = CUDAExtension(
        "rasa_ext._C",
        sources(root),
        include_dirs=[str(root / "csrc")],
        depends=sorted(str(path) for path in root.glob("csrc/**/*.*h")),
        extra_compile_args={
            # The last include folder, so that only cuBLAS headers are read from it.
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
    """Make torch importable, and set its build variables unless the user has set them."""
    if str(found.site_packages) not in sys.path:
        sys.path.append(str(found.site_packages))
    os.environ.setdefault("CUDA_HOME", str(found.cuda_home))
    # By default torch compiles for the visible GPUs.
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = supported_archs(found.cuda_home, ARCHS)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    # Find the target environment's ninja too, as an isolated build environment may have none.
    scripts = found.site_packages.parents[2] / "bin"
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(scripts)))
