"""Adapter directories: configuration, safetensors file and card, written as one."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rasa_ext.checkpoint.card import card_file
from rasa_ext.checkpoint.writing import made, writing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_ANOTHER_COPY = "take a whole copy of it, or the checkpoint before it"
DIGEST = "sha256"
"""The entry of a safetensors file's metadata that `digest` fills."""

_FACTOR = re.compile(r"\.(rasa|lora)_\w+(\.weight)?$")


def write_adapter(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str | None = None,
) -> None:
    """Write the files of an adapter directory, or leave all of them as they were.

    Each is written beside its place and flushed to disk before the first is moved there, and
    whatever fails until then, or in the moves, brings back the old ones. Where the system refuses,
    the error is a `WriteError`. A ``card`` is written as `card_file` has it.
    """
    directory = Path(directory)
    texts = {CONFIG: json.dumps(dict(config), indent=2) + "\n", **card_file(directory, card)}
    ready = {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }
    there = (directory / WEIGHTS).exists()
    whole = "the adapter that is there is whole" if there else "nothing was left there"
    with writing(directory, whole), made(directory):
        _write_together(directory, ready, texts)


def _write_together(
    directory: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> None:
    names = (WEIGHTS, *texts)
    new = {name: directory / f".{name}.new" for name in names}
    old = {name: directory / f".{name}.old" for name in names}
    try:
        _save(tensors, new[WEIGHTS])
        for name, text in texts.items():
            new[name].write_text(text, encoding="utf-8", newline="\n")
        # Some releases of safetensors write files that only their owner may read.
        os.chmod(new[WEIGHTS], new[CONFIG].stat().st_mode)
        for name in names:
            with open(new[name], "rb+") as file:
                os.fsync(file.fileno())
            old[name].unlink(missing_ok=True)
            if (directory / name).exists():
                os.link(directory / name, old[name])
        _move_together(directory, new, old)
    finally:
        for path in (*new.values(), *old.values()):
            path.unlink(missing_ok=True)


def _move_together(directory: Path, new: Mapping[str, Path], old: Mapping[str, Path]) -> None:
    begun = []
    try:
        for name, path in new.items():
            begun.append(name)
            os.replace(path, directory / name)
    except BaseException:
        for name in begun:
            if old[name].exists():
                os.rename(old[name], directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        raise


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names, dtypes, shapes and bytes, in the order of names; on the CPU."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous()
        # Read in place: numpy, whose arrays hashlib would take, need not be installed.
        total.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
    return total.hexdigest()


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with its digest: the same bytes for the same tensors."""
    sha = digest(tensors)
    save_file(dict(tensors), path, metadata={"format": "pt", DIGEST: sha})
    first, second = b'"format":"pt"', f'"{DIGEST}":"{sha}"'.encode()
    with open(path, "rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        # safetensors leaves the order of the two to chance.
        file.write(header.replace(second + b"," + first, first + b"," + second))


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``adapter_config.json``; FileNotFoundError or ValueError with the path."""
    path = Path(directory) / CONFIG
    if Path(directory).is_file():
        raise FileNotFoundError(
            f"directory: expected an adapter's directory, got the file {directory}; pass "
            f"{Path(directory).parent}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected an adapter directory, but {path} is missing.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged or cut, since it does not parse as JSON ({error}); {_ANOTHER_COPY}."
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    ValueError where the file is damaged: it does not parse, or tells another digest than its
    tensors have. Files of other writers tell none, and are taken as they are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected an adapter directory, but {path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(DIGEST)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or cut, since it does not parse as safetensors ({error}); "
            f"{_ANOTHER_COPY}."
        ) from None
    if told is not None and told != (found := digest(tensors)):
        raise ValueError(
            f"{path}: expected tensors of the SHA-256 that the file tells, {told}, got {found}; "
            f"the file was damaged or edited since it was written, so {_ANOTHER_COPY}."
        )
    return tensors


def read_either(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's safetensors file or, where there is none, of its ``.bin``.

    Nothing in a ``.bin`` can run code: it is read with ``weights_only=True``, or refused.
    """
    path = directory / PICKLE
    if (directory / WEIGHTS).is_file() or not path.is_file():
        return read_tensors(directory / WEIGHTS)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: refused, since it holds more than tensors or is damaged, and reading it "
            "could run code; ask its author for a safetensors file. "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(data).__name__}.")
    return data


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that hold NaN, or, among an adapter's factors, infinity."""
    return [
        name
        for name, tensor in tensors.items()
        if not (tensor.isfinite() if _FACTOR.search(name) else ~tensor.isnan()).all()
    ]


def check_finite(
    tensors: Mapping[str, Tensor], where: str, state: str = "Nothing was changed"
) -> None:
    """ValueError, naming the keys and the ``state`` left, where `not_finite` finds any."""
    if bad := not_finite(tensors):
        raise ValueError(
            f"{where}: expected finite numbers, but {len(bad)} of {len(tensors)} tensors hold NaN "
            f"or infinity: {', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}; the training "
            "that wrote them had diverged, so take an earlier checkpoint, or train again at a "
            f"lower learning rate. {state}."
        )


def check_tensors(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Iterable[int]],
    where: str,
    hint: str = "",
) -> None:
    """ValueError, naming the keys, unless ``found`` has just the expected names and shapes.

    ``hint`` is a sentence, on what to do, that the message ends with.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} (expected {tuple(shape)}, got {tuple(found[key].shape)})"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{where}: the adapter does not fit the model. {hint}{' ' if hint else ''}"
            f"Tensors: {'; '.join(problems)}. Nothing was changed."
        )
