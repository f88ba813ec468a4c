"""A run's training checkpoints: which is the newest that is whole, and what ails a newer one."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rasa_ext.checkpoint.files import CONFIG, PICKLE, WEIGHTS, read_config, read_tensors
from rasa_ext.checkpoint.writing import STALE

_STATE = "trainer_state.json"
_ZIPS = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt", "training_args.bin")
"""Files that torch.save writes: zip archives, with a checksum for every entry."""
RUN = "run.json"
"""What the steps up to a checkpoint were made with: options, processes and the data's digest."""
_NEEDED = (CONFIG, WEIGHTS, RUN, _STATE, "optimizer.pt", "scheduler.pt")


class Checkpoint(NamedTuple):
    """The newest whole checkpoint of a run."""

    step: int
    path: Path
    damaged: dict[Path, str]
    """Newer ones that are not whole, newest first, each with what is wrong with it."""

    def __str__(self) -> str:
        """Tell which checkpoint this is, and of each damaged one why it is not that."""
        told = "".join(f"{path} is damaged: {why}. " for path, why in self.damaged.items())
        before = ", the one before it" if self.damaged else ""
        return f"{told}Going on from {self.path}{before}."


def newest_whole(folder: Path) -> Checkpoint:
    """Find the newest checkpoint in a run's output folder from which it can go on.

    Every file that a resume reads is read to its end: the adapter by its SHA-256, what torch wrote
    by the checksums of its entries. Nothing is unpickled. A folder without Trainer's own state,
    which is written last, is one whose writing was cut off.

    Args:
        folder: what Trainer was given as ``output_dir``.

    Raises:
        FileNotFoundError: there is no checkpoint in it.
        ValueError: there are some, and none is whole; the message has each one's damage.
    """
    damaged: dict[Path, str] = {}
    for step, path in sorted(_numbered(folder), reverse=True):
        why = _damage(path)
        if why is None:
            return Checkpoint(step, path, damaged)
        damaged[path] = why
    if not damaged:
        raise FileNotFoundError(f"resume: expected a checkpoint in {folder}, found none.")
    told = "; ".join(f"{path}: {why}" for path, why in damaged.items())
    raise ValueError(
        f"resume: expected a whole checkpoint in {folder}, but all are damaged ({told}); start "
        "without --resume in another folder."
    )


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """List checkpoints as (step, path), oldest first, less those whose writing was cut off."""
    return sorted(found for found in _numbered(folder) if (found[1] / _STATE).is_file())


def make_room(folder: Path) -> None:
    """Remove what would pass for a new run's own: an earlier run's checkpoints, and weights."""
    for _, path in _numbered(folder):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (*STALE, CONFIG, WEIGHTS, PICKLE):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            yield int(step), path


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as a clause; None where nothing is."""
    missing = [name for name in _NEEDED if not (checkpoint / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing, so its writing was cut off"
    try:
        read_config(checkpoint)
        read_tensors(checkpoint / WEIGHTS)
        for name in (RUN, _STATE):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
    except ValueError as error:
        return str(error).removesuffix(".")
    for pattern in _ZIPS:
        for path in sorted(checkpoint.glob(pattern)):
            try:
                with zipfile.ZipFile(path) as archive:
                    bad = archive.testzip()
            except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError):
                return f"{path.name} is damaged or cut"
            if bad is not None:
                return f"{path.name} is damaged (its entry {bad} has another checksum)"
    return None
