"""Files of an adapter directory: a config and a safetensors file, written together."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rasa_ext.writing import CONFIG as CONFIG
from rasa_ext.writing import INSIDE, OLD, new_folder

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_ANOTHER_COPY = "use a complete copy of it, or an earlier checkpoint"
DIGEST = "sha256"
"""Metadata entry of a safetensors file that holds the `digest`."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FACTOR = re.compile(r"\.(rasa|lora)_\w+(\.weight)?$")


def write_adapter(
    directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the files of an adapter directory, or leave all of them unchanged.

    Args:
        directory: created if missing.
        config: content of ``adapter_config.json``.
        tensors: content of ``adapter_model.safetensors``.

    Raises:
        OSError: the files cannot be written (a ``WriteError``).

    Example:
        >>> from rasa_ext.checkpoint import write_adapter
        >>> write_adapter("adapter", {"peft_type": "MINE"}, {"x": torch.ones(2)})
    """
    with new_folder(Path(directory)) as folder:
        write_files(folder, config, tensors)


def write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder; equal tensors give equal bytes."""
    check_in_memory(tensors)
    ready = {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }
    sha = digest(ready)
    save_file(ready, folder / WEIGHTS, metadata={"format": "pt", DIGEST: sha})
    first, second = b'"format":"pt"', f'"{DIGEST}":"{sha}"'.encode()
    with open(folder / WEIGHTS, "rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        # safetensors does not fix the order of the two.
        file.write(header.replace(second + b"," + first, first + b"," + second))
    write_json(folder / CONFIG, config)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a config as JSON."""
    path.write_text(json.dumps(dict(data), indent=2) + "\n", encoding="utf-8", newline="\n")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over names, dtypes, shapes and bytes, in order of names; on the CPU."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous()
        # Read in place: hashlib would take numpy arrays, but numpy may not be installed.
        total.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
    return total.hexdigest()


def located(directory: str | os.PathLike[str]) -> Path:
    """Return a directory as it is, or the local copy of the adapter with that id on the Hub.

    Raises FileNotFoundError if there is neither.
    """
    path, name = Path(directory), os.fspath(directory)
    if path.exists() or not _REPOSITORY.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"directory: expected an adapter's directory, or its id on the Hub, got {name!r}; "
            f"there is no such directory here, and the Hub lookup failed: {reason}"
        ) from error


def file_in(directory: str | os.PathLike[str], name: str) -> Path:
    """Return the path of an adapter's file, or of the old file if a save was killed halfway."""
    directory = Path(directory)
    if not (directory / CONFIG).exists():
        for old in directory.glob(f".{INSIDE}.*.part/{OLD}"):
            if (old / CONFIG).is_file() and (old / name).is_file():
                return old / name
    return directory / name


def check_files(directory: str | os.PathLike[str]) -> None:
    """Raise ValueError if a file of an adapter is a pipe, for which a reader would wait."""
    for path in (Path(directory, name) for name in (CONFIG, WEIGHTS, PICKLE)):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected a file, got a folder, a pipe or a device.")


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors of one version, even if a save runs meanwhile.

    Args:
        directory: directory of an adapter of any method.

    Returns:
        The content of ``adapter_config.json``, and the tensors by name.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; the message has the path.

    Example:
        >>> from rasa_ext.checkpoint import read_adapter, write_adapter
        >>> write_adapter("adapter", {"peft_type": "MINE"}, {"x": torch.ones(2)})
        >>> read_adapter("adapter")
        ({'peft_type': 'MINE'}, {'x': tensor([1., 1.])})
    """
    while True:
        path, text = _config_text(directory)
        config = _parsed(path, text)
        tensors = read_either(file_in(directory, WEIGHTS).parent)
        if _config_text(directory)[1] == text:
            return config, tensors


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return ``adapter_config.json``; raise FileNotFoundError or ValueError with the path."""
    return _parsed(*_config_text(directory))


def _config_text(directory: str | os.PathLike[str]) -> tuple[Path, bytes]:
    if Path(directory).is_file():
        raise FileNotFoundError(
            f"directory: expected an adapter's directory, got the file {directory}; pass "
            f"{Path(directory).parent}."
        )
    path = file_in(directory, CONFIG)
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected an adapter directory, but {path} is missing.")
    return path, path.read_bytes()


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged or cut: it does not parse as JSON ({error}); {_ANOTHER_COPY}."
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}.")
    return data


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, or the tensors named, onto the CPU.

    Raises ValueError if the file is damaged: it does not parse, or the digest in it does not match.
    Files of other writers have no digest and are not compared.
    """
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected an adapter directory, but {path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get(DIGEST)
            keys = [key for key in file.keys() if names is None or key in names]  # noqa: SIM118
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or cut: it does not parse as safetensors ({error}); {_ANOTHER_COPY}."
        ) from None
    if names is None and stated is not None and stated != (actual := digest(tensors)):
        raise ValueError(
            f"{path}: expected tensors with the SHA-256 that the file states, {stated}, got "
            f"{actual}; the file was damaged or edited since it was written, so {_ANOTHER_COPY}."
        )
    return tensors


def read_either(directory: Path) -> dict[str, Tensor]:
    """Read an adapter's safetensors file or, if there is none, the ``.bin``.

    A ``.bin`` cannot run code: it is read with ``weights_only=True``, or refused.
    """
    path = directory / PICKLE
    if (directory / WEIGHTS).is_file() or not path.is_file():
        return read_tensors(directory / WEIGHTS)
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):
                _check_zip(zipfile.ZipFile(file), path.stat().st_size)
            file.seek(0)
            data = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes may raise anything
            raise ValueError(
                f"{path}: refused, since it holds more than tensors or is damaged, and reading it "
                "could run code; ask its author for a safetensors file. "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from None
    if not isinstance(data, dict) or not all(
        isinstance(key, str) and isinstance(t, Tensor) for key, t in data.items()
    ):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(data).__name__}.")
    for name, t in data.items():
        unusual = t.layout != torch.strided or t.is_meta or t.is_quantized
        if unusual or t.untyped_storage().nbytes() < t.nbytes:
            raise ValueError(
                f"{path}: expected dense tensors whose every number is in the file, but {name} is "
                "not one; ask its author for a safetensors file."
            )
    return data


def _check_zip(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError for a file that is larger in memory than on disk; torch writes none."""
    entries = archive.infolist()
    if packed := next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None):
        raise ValueError(f"its entry {packed.filename} is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries overlap")
    if bad := archive.testzip():
        raise ValueError(f"its entry {bad} has a wrong checksum")


def check_in_memory(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, if one is on meta and so has no values."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"model: expected weights in memory, but {name} is on the meta device, as when "
                "the base is offloaded; load the base without offloading, with device_map=None."
            )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that hold NaN or, among an adapter's factors, infinity."""
    factors = {name for name in tensors if _FACTOR.search(name) and not _is_narrow(tensors[name])}
    return [
        name
        for name, tensor in tensors.items()
        if (~tensor.isfinite() if name in factors else tensor.isnan()).any()
    ]


def _is_narrow(tensor: Tensor) -> bool:
    """Return whether numbers have 8 bits or fewer, with which torch cannot compute."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 2


def check_finite(
    tensors: Mapping[str, Tensor], where: str, state: str = "Nothing was changed"
) -> None:
    """Check that tensors hold finite numbers of 16 bits or more.

    Args:
        tensors: tensors by name.
        where: start of the error.
        state: what the error says about the work done so far.

    Raises:
        ValueError: a tensor does not; the message names it.

    Example:
        >>> rasa_ext.checkpoint.check_finite({"x": torch.ones(2)}, "adapter")
    """
    if narrow := next((name for name in tensors if _is_narrow(tensors[name])), None):
        raise ValueError(
            f"{where}: expected 16 bits or more, but {narrow} has {tensors[narrow].dtype}. {state}."
        )
    if bad := not_finite(tensors):
        raise ValueError(
            f"{where}: expected finite numbers, but {len(bad)} of {len(tensors)} tensors hold NaN "
            f"or infinity: {', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}; the training "
            f"diverged, so take an earlier checkpoint or a lower learning rate. {state}."
        )


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]], where: str, hint: str = ""
) -> None:
    """Check that tensors have exactly the expected names and shapes.

    Args:
        found: the tensors.
        expected: shapes by name.
        where: start of the error.
        hint: a sentence on what to do.

    Raises:
        ValueError: names or shapes differ; the message has them.

    Example:
        >>> rasa_ext.checkpoint.check_tensors({"x": torch.ones(2)}, {"x": (2,)}, "adapter")
    """
    found_by_problem = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} (expected {tuple(shape)}, got {tuple(found[key].shape)})"
            for key, shape in expected.items()
            if key in found and tuple(found[key].shape) != tuple(shape)
        ],
    }
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''}"
        for kind, keys in found_by_problem.items()
        if keys
    ]
    if problems:
        raise ValueError(
            f"{where}: the adapter does not fit the model. {hint}{' ' if hint else ''}"
            f"Tensors: {'; '.join(problems)}. Nothing was changed."
        )
