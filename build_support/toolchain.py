"""Find the torch, nvcc and cuBLAS with which to compile the CUDA kernels.

Nothing here imports torch, needs a GPU or downloads anything. ``Missing`` names a missing part in
one sentence.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 10)


class Missing(Exception):
    """A part that the kernels need is missing. The message is one sentence without a full stop."""


@dataclass(frozen=True)
class Toolchain:
    """The torch, CUDA toolkit and cuBLAS of a build."""

    site_packages: Path  # has the torch to build for
    torch: str  # torch's version, such as 2.11.0+cu130
    cuda_home: Path
    cublas_include: Path
    cublas_libraries: tuple[Path, Path]  # libcublas and libcublasLt


def find() -> Toolchain:
    """Find the toolchain of this environment. Raises ``Missing``."""
    site_packages = _torch_site()
    version, cuda = _torch_version(site_packages)
    if cuda is None:
        raise Missing(f"torch {version} is built without CUDA")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise Missing(f"torch {version} is older than {'.'.join(map(str, MIN_TORCH))}")
    home = cuda_home(site_packages)
    release = _release(home)
    if release.partition(".")[0] != cuda.partition(".")[0]:
        raise Missing(f"nvcc is of CUDA {release} and torch {version} of CUDA {cuda}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise Missing(f"there is no C++ compiler ({compiler})")
    # Toolkits often lack cuBLAS; torch's wheels install it as a separate package.
    packages = sorted(site_packages.glob("nvidia/*"))
    header = _first((home, *packages), ("include", "targets/*/include"), "cublas_v2.h")
    folders = ("lib64", "lib", "targets/*/lib")
    cublas = _first((home, *packages), folders, "libcublas.so*")
    cublas_lt = _first((home, *packages), folders, "libcublasLt.so*")
    return Toolchain(site_packages, version, home, header.parent, (cublas, cublas_lt))


def supported_archs(home: Path, wanted: tuple[str, ...]) -> list[str]:
    """Return the architectures in ``wanted`` (such as "9.0") that ``home``'s nvcc can compile for.

    If there is none, return the first one.
    """
    listed = _output([str(home / "bin" / "nvcc"), "--list-gpu-arch"])
    known = set(re.findall(r"compute_(\d+)", listed))
    return [arch for arch in wanted if arch.replace(".", "") in known] or list(wanted[:1])


def _torch_site() -> Path:
    """Find the site-packages directory of the torch to build for.

    An isolated build does not see the target environment's packages. But it runs with that
    environment's interpreter (pip), or with its VIRTUAL_ENV or CONDA_PREFIX (other front ends).
    """
    seen = list(dict.fromkeys(path for path in _candidates() if path.is_dir()))
    for path in seen:
        if (path / "torch" / "version.py").is_file():
            return path
    raise Missing("the build found no torch; install torch first, then rasa-ext again")


def _candidates() -> Iterator[Path]:
    yield from (Path(entry) for entry in sys.path if entry)
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    libs = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if variable in os.environ:
            yield Path(os.environ[variable]) / libs
    if site.ENABLE_USER_SITE:
        yield Path(site.getusersitepackages())
    config = Path(sys.prefix) / "pyvenv.cfg"
    outer = config.is_file() and re.search(r"system-site-packages\s*=\s*true", config.read_text())
    if outer or sys.prefix == sys.base_prefix:
        yield from (Path(path) for path in site.getsitepackages([sys.base_prefix]))


def _torch_version(site_packages: Path) -> tuple[str, str | None]:
    """Read the version and CUDA version of an installed torch, without importing it."""
    text = (site_packages / "torch" / "version.py").read_text()

    def value(name: str) -> str | None:
        found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return found and found[1]

    return value("__version__") or "of unknown version", value("cuda")


def cuda_home(site_packages: Path) -> Path:
    """Find the toolkit's root.

    An nvcc on PATH may be a script outside the toolkit, so a dry run of nvcc shows the root.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            home = Path(os.environ[variable])
            if (home / "bin" / "nvcc").is_file():
                return home
            raise Missing(f"{variable} is {home}, which holds no bin/nvcc")
    nvcc = shutil.which("nvcc") or next(map(str, site_packages.glob("nvidia/*/bin/nvcc")), None)
    if nvcc is None:
        raise Missing("there is no nvcc on PATH, and CUDA_HOME is not set")
    top = re.search(r"TOP=(.+)", _output([nvcc, "--dryrun", "-x", "cu", os.devnull]))
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    if not (home / "bin" / "nvcc").is_file():
        raise Missing(f"{nvcc} names no toolkit; set CUDA_HOME")
    return home.resolve()


def _release(home: Path) -> str:
    found = re.search(r"release (\d+\.\d+)", _output([str(home / "bin" / "nvcc"), "--version"]))
    if found is None:
        raise Missing(f"{home}/bin/nvcc does not say its version")
    return found[1]


def _first(roots: tuple[Path, ...], folders: tuple[str, ...], name: str) -> Path:
    for root in roots:
        for folder in folders:
            for path in sorted(root.glob(f"{folder}/{name}")):
                return path
    raise Missing(f"{name} is neither in {roots[0]} nor beside torch")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Missing(f"{command[0]} does not run ({error})") from None
    return done.stdout + done.stderr
