"""Compression of several LoRAs into one directory with a shared basis, and expansion of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rasa_ext.commands.parsing import check_differs
from rasa_research.solver.compress_many import (
    CompressedLoras,
    check_names,
    compress_many,
    folder_name,
)
from rasa_research.solver.lora_set import LoraSet


def compress_directories(
    given: Sequence[str],
    output: Path,
    rank: int,
    *,
    iterations: int,
    progress: Callable[[str, int, int], None],
    overwrite: bool = False,
) -> CompressedLoras:
    """Write several LoRAs, each a directory or NAME=DIRECTORY, as one set.

    Raises ValueError or FileNotFoundError if the LoRAs cannot be read or do not fit together, or if
    ``output`` has files and ``overwrite`` is False; `WriteError` if it cannot be written.
    """
    directories = _directories(given)
    check_differs(directories.values(), output, overwrite=overwrite)
    found = compress_many(directories, rank, iterations=iterations, progress=progress)
    found.loras.save(output)
    return found


def expand_set(
    directory: Path, names: Sequence[str], output: Path, *, overwrite: bool = False
) -> LoraSet:
    """Write LoRAs of a set, by default all, each into a folder of its name in ``output``.

    Raises like `compress_directories`.
    """
    check_differs((directory,), output, overwrite=overwrite)
    loras = LoraSet.load(directory)
    check_names((name, directory) for name in loras.names)  # names from a file become paths
    for name in names:
        loras.index(name)  # raise before anything is written
    for name in names or loras.names:
        loras.expand(name, output / name)
    return loras


def _directories(given: Sequence[str]) -> dict[str, Path]:
    """Return the directories by name. An existing path may contain an equals sign."""
    pairs = []
    for text in given:
        name, equals, path = text.partition("=")
        named = equals and not Path(text).exists()
        pairs.append((name, Path(path)) if named else (folder_name(text), Path(text)))
    return check_names(pairs)
