"""Rows of figures as JSON and markdown, and a description of the machine."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import rasa_ext
from benchmarks import harness
from rasa_ext import ops

# Environment variable that names the commit if there is no .git.
COMMIT = "RASA_EXT_COMMIT"
PACKAGES = ("peft", "transformers", "triton", "nvidia-cublas")
_KERNELS = ops.OPERATORS.keys() - ops.COMPOSED
"""The operators that have compiled kernels."""


class Results:
    """Rows that are written to a file as they are added, so that an interruption loses none.

    The file is JSON, with the machine and the rows; without a ``path`` they stay in memory.
    """

    def __init__(self, path: Path | str | None, device: str) -> None:
        self.path = None if path is None else Path(path)
        self.head = environment(device)
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> dict[str, Any]:
        """Store a row, print it, write all rows, and return the row for ``extend``."""
        self.rows.append(row)
        print("  ".join(f"{key}={shown(value)}" for key, value in row.items()), flush=True)
        self._write()
        return row

    def extend(self, row: dict[str, Any], **more: Any) -> None:
        """Add cells to a stored row, and write all rows."""
        row.update(more)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, {"machine": self.head, "rows": self.rows})


def write_json(path: Path, value: Any) -> None:
    """Write all of the value or nothing: a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return every key of every row, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def tables(rows: list[dict[str, Any]]) -> str:
    """Format rows as markdown tables, one for each set of rows with the same keys."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return "\n\n".join(table(kind) for kind in kinds.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a markdown table; rows may have different keys."""
    names = columns(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = (shown(row.get(name)).replace("|", "\\|").replace("\n", " ") for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Format a figure with four significant digits, quartiles around a median, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):  # an interval, perhaps around a median
        low, *middle, high = map(shown, value)
        return f"{middle[0]} ({low}-{high})" if middle else f"{low} to {high}"
    return str(value)


def environment(device: str) -> dict[str, Any]:
    """Return card, driver and versions, without which a figure means nothing."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "card": None,
        "driver": None,
        "host": harness.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the build, which the metadata of PyPI's wheels omits
        "cuda": torch.version.cuda,
        "rasa_ext": rasa_ext.__version__,
        "commit": os.environ.get(COMMIT) or _output("git", "describe", "--always", "--dirty"),
        "kernels": ops.cuda_status(),
        "operators with a CUDA kernel": f"{_attached()} of {len(_KERNELS)}",
    }
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["card"] = (
            f"{properties.name}, {properties.multi_processor_count} SMs, "
            f"{properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
        query = ("--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
        found["driver"] = _output("nvidia-smi", *query)
        found["nvcc"] = (_output("nvcc", "--version") or "-").splitlines()[-1]
    return found


def kernels_missing(device: str) -> str | None:
    """Return why operators run as PyTorch operations on a CUDA device, or None if they do not."""
    if not device.startswith("cuda") or _attached() == len(_KERNELS):
        return None
    return f"{_attached()} of {len(_KERNELS)} operators have a CUDA kernel; {ops.cuda_status()}"


def _attached() -> int:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return sum(has(f"rasa_ext::{name}", "CUDA") for name in _KERNELS)


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that benchmarks share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", metavar="FILE", help="write rows here as they come")
    made.add_argument("--seconds", type=float, default=120, help="start nothing new after this")
    made.add_argument("--quick", action="store_true", help="tiny shapes, to test the benchmark")
    return made


class Budget:
    """Seconds, shared evenly among the remaining parts."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, parts: float) -> float:
        return max(self.left(), 0.0) / max(parts, 1)


def main() -> None:
    """Print the machine as JSON: ``python -m benchmarks.records cpu``."""
    print(json.dumps(environment(sys.argv[1])))


if __name__ == "__main__":
    main()
