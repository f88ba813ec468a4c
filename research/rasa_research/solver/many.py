"""Several LoRAs in, one directory with their shared basis out; and LoRAs out of it again."""

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

    Raises ValueError or FileNotFoundError where they cannot be read or do not go together, or
    ``output`` holds files and ``overwrite`` was not asked for; `WriteError` where it cannot be
    written.
    """
    directories = _directories(given)
    check_differs(directories.values(), output, overwrite=overwrite)
    found = compress_many(directories, rank, iterations=iterations, progress=progress)
    found.loras.save(output)
    return found


def expand_set(
    directory: Path, names: Sequence[str], output: Path, *, overwrite: bool = False
) -> LoraSet:
    """Write some LoRAs of a set, or without ``names`` all, each into ``output`` under its name.

    Raises as `compress_directories` does.
    """
    check_differs((directory,), output, overwrite=overwrite)
    loras = LoraSet.load(directory)
    check_names((name, directory) for name in loras.names)  # a file's own, which become paths
    for name in names:
        loras.index(name)  # before anything is written
    for name in names or loras.names:
        loras.expand(name, output / name)
    return loras


def _directories(given: Sequence[str]) -> dict[str, Path]:
    """The directories by name; a path that exists may itself have an equals sign."""
    pairs = []
    for text in given:
        name, equals, path = text.partition("=")
        named = equals and not Path(text).exists()
        pairs.append((name, Path(path)) if named else (folder_name(text), Path(text)))
    return check_names(pairs)
