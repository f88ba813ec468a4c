"""Build the compiled library once, and check the file under every supported torch and Python.

    python tests/build/check_build.py [--envs DIR] [--env PYTHON=TORCH ...] [--keep DIR]

Missing environments are created in DIR (about 5 GB each, from the package index). The library is
built in the first one, and --keep keeps it and the compiler's output for tests/build/sass.py. No
GPU is needed, and no kernel is launched. The script checks that:

- every operator that does not call torch's own kernels has a CUDA kernel under every torch and
  Python;
- the file needs only symbols of libc, libstdc++, CUDA and torch's C shims;
- no kernel has a stack frame or spills registers on any architecture.

The exit status is 1 if a check fails.
"""

import argparse
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_ENVS = (f"{sys.executable}=2.11.0", "python3.13=2.15.0")
LIBRARY, LOG = Path("rasa_ext/_C.abi3.so"), "build.log"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
SOURCES = (
    "build_support",
    "csrc",
    "rasa_ext",
    "setup.py",
    "pyproject.toml",
    "LICENSE",
    "README.md",
)

# Symbols of system libraries have a version suffix; those of torch and CUDA have a prefix.
SYSTEM_VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
PREFIXES = ("aoti_torch_", "torch_", "cuda", "__cuda", "cublas")

PROBE = """
import platform, torch
from rasa_ext import ops
from rasa_ext.ops import library
assert library.COMPILED, ops.cuda_status()
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [name for name in ops.OPERATORS if name not in ops.COMPOSED]
missing = [name for name in names if not has("rasa_ext::" + name, "CUDA")]
print(platform.python_version(), torch.__version__, len(names), ",".join(missing) or "none")
"""


@dataclass
class Report:
    """Prints the result of each check and collects failures."""

    failures: list[str] = field(default_factory=list)

    def check(self, good: bool, text: str) -> None:
        print(f"{'ok  ' if good else 'FAIL'}  {text}", flush=True)
        if not good:
            self.failures.append(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--envs", type=Path, default=ROOT / "build" / "envs")
    parser.add_argument("--env", action="append", metavar="PYTHON=TORCH")
    parser.add_argument("--keep", type=Path, help=f"for {LIBRARY.name} and {LOG}")
    options = parser.parse_args()
    report = Report()
    pythons = [make_env(options.envs, *env.split("=")) for env in options.env or DEFAULT_ENVS]
    with tempfile.TemporaryDirectory() as scratch:
        wheel, log, seconds = build(pythons[0], Path(scratch))
        print(f"      build: {wheel.name} in {seconds:.0f} s of processor time")
        report.check("-cp311-abi3-" in wheel.name, "the wheel serves every Python from 3.11 on")
        unpacked = Path(scratch) / "unpacked"
        zipfile.ZipFile(wheel).extractall(unpacked)
        check_symbols(report, unpacked / LIBRARY)
        check_kernels(report, log)
        for python in pythons:
            check_import(report, python, unpacked)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(unpacked / LIBRARY, options.keep)
            (options.keep / LOG).write_text(log)
    print(f"{len(report.failures)} checks failed" if report.failures else "all checks passed")
    return 1 if report.failures else 0


def make_env(folder: Path, python: str, torch: str) -> Path:
    """Return the interpreter of an environment with this Python and torch; create it if missing."""
    if Path(python).is_dir():  # an existing environment
        return Path(python) / "bin" / "python"
    found = shutil.which(python)
    if found is None:
        raise SystemExit(f"--env: expected a Python interpreter, got {python!r}; install it.")
    env = folder / f"{Path(found).name}-torch{torch}"
    interpreter = env / "bin" / "python"
    if not (env / "complete").exists():
        start = time.monotonic()
        run([found, "-m", "venv", "--clear", str(env)])
        run([*install(interpreter), f"torch=={torch}", "numpy", "safetensors", "regex"])
        (env / "complete").touch()
        print(f"made {env} in {time.monotonic() - start:.0f} s", flush=True)
    return interpreter


def install(python: Path) -> list[str]:
    """Return a command that installs for this Python: by uv if it is there, else by pip.

    uv unpacks a wheel once, and links the files of the cache into every environment.
    """
    if importlib.util.find_spec("uv"):
        return [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python)]
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    return [*pip, "--no-compile"]


def build(python: Path, scratch: Path) -> tuple[Path, str, float]:
    """Build a copy of the sources with build isolation; return wheel, output and seconds."""
    source = scratch / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
        elif path.exists():
            shutil.copy(path, source)
    command = [str(python), "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir"]
    start = processor_time()
    log = run(
        [*command, "--disable-pip-version-check", "-w", str(scratch / "wheels"), str(source)],
        env=os.environ | {"RASA_EXT_CUDA": "1"},
    )
    return next((scratch / "wheels").glob("*.whl")), log, processor_time() - start


def processor_time() -> float:
    """Return the seconds of processor time of all programs run so far, on whatever cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check_symbols(report: Report, library: Path) -> None:
    listing = run(["nm", "-D", "--undefined-only", str(library)])
    # torch also exports some templates of libstdc++, and the linker may bind to those.
    standard = run([os.environ.get("CXX", "c++"), "-print-file-name=libstdc++.so.6"]).strip()
    defined = {
        line.split()[-1].partition("@")[0]
        for line in run(["nm", "-D", standard]).split("\n")
        if line
    }
    counts: dict[str, int] = defaultdict(int)
    strangers = []
    for line in listing.splitlines():
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if version.lstrip("@").startswith(SYSTEM_VERSIONS) or kind == "w" or name in defined:
            counts["system libraries"] += 1
        elif prefix is not None:
            counts[prefix + "*"] += 1
        else:
            strangers.append(symbol)
    found = ", ".join(f"{count} of {group}" for group, count in sorted(counts.items()))
    report.check(not strangers, f"undefined symbols: {found}; others: {strangers or 'none'}")


def check_kernels(report: Report, log: str) -> None:
    """Check ptxas's report on every kernel for every architecture."""
    kernels = list(read_ptxas(log))
    print(f"      {'':8} kernels  registers (most)  stack frames  spills")
    for arch in ARCHS:
        mine = [kernel for kernel in kernels if kernel.arch == arch]
        stacks = [kernel.name for kernel in mine if kernel.stack]
        spills = [kernel.name for kernel in mine if kernel.spills]
        most = max((kernel.registers for kernel in mine), default=0)
        text = f"{arch:8} {len(mine):7}  {most:16}  {len(stacks):12}  {len(spills):6}"
        report.check(bool(mine) and not stacks and not spills, text)
        for name in dict.fromkeys(stacks + spills):
            print(f"      {name}")


@dataclass
class Kernel:
    """ptxas's report on one kernel for one architecture; static shared memory in bytes as well."""

    name: str
    arch: str
    stack: int = 0
    spills: int = 0
    registers: int = 0
    shared: int = 0


def read_ptxas(log: str) -> Iterator[Kernel]:
    kernel = None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(sm_\d+)", line):
            kernel = Kernel(entry[1], entry[2])
        elif kernel and (frame := re.search(r"(\d+) bytes stack frame", line)):
            kernel.stack = int(frame[1])
            kernel.spills = sum(map(int, re.findall(r"(\d+) bytes spill", line)))
        elif kernel and (used := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
            yield kernel
            kernel = None


def check_import(report: Report, python: Path, unpacked: Path) -> None:
    done = subprocess.run(
        [str(python), "-c", PROBE],
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        cwd=unpacked,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        report.check(False, f"{python}: {done.stderr.strip().splitlines()[-1]}")
        return
    version, torch, count, missing = done.stdout.split()
    report.check(
        missing == "none",
        f"Python {version}, torch {torch}: {count} operators with kernels, without: {missing}",
    )


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
