"""Adapter directories: a configuration and a safetensors file, written as one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_adapter(
    directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write both files of an adapter directory, or leave both as they were.

    Each is written beside its place and flushed to disk before either is moved there; a failure
    until then, or in the moves, brings back the old pair.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(config), indent=2) + "\n"
    ready = {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }

    def weights(path: Path) -> None:
        save_file(ready, path, metadata={"format": "pt"})

    def settings(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    _replace_together(directory, {WEIGHTS: weights, CONFIG: settings})


def _replace_together(directory: Path, writers: Mapping[str, Any]) -> None:
    suffix = f".{os.getpid()}"
    fresh = {directory / name: directory / f".{name}{suffix}.new" for name in writers}
    old = {directory / name: directory / f".{name}{suffix}.old" for name in writers}
    done: list[Path] = []
    try:
        for path, write in zip(fresh.values(), writers.values(), strict=True):
            write(path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for place in fresh:
            if place.exists():
                os.link(place, old[place])
        for place, path in fresh.items():
            os.replace(path, place)
            done.append(place)
    except BaseException:
        for place in done:
            if old[place].exists():
                os.rename(old[place], place)
            else:
                place.unlink()
        raise
    finally:
        for path in (*fresh.values(), *old.values()):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``adapter_config.json``; FileNotFoundError or ValueError with the path."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected an adapter directory, but {path} is missing.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, but it does not parse ({error}).") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected an adapter directory, but {path} is missing.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({error}).") from None


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]], where: str
) -> None:
    """ValueError, naming the keys, unless ``found`` has just the expected names and shapes."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} (expected {tuple(shape)}, got {tuple(found[key].shape)})"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{where}: the adapter does not fit the model; {'; '.join(problems)}. "
            "Nothing was changed."
        )
