"""A run's training checkpoints, and the newest that is whole."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from rich.console import Console

from rasa_ext.checkpoint.files import CONFIG, PICKLE, WEIGHTS, read_config, read_tensors
from rasa_ext.writing import STALE

# What the steps up to a checkpoint were made with: options, processes and the data's digest.
RUN = "run.json"
_STATE = "trainer_state.json"
# Files that torch.save writes: zip archives, with a checksum for every entry.
_ZIPS = ("optimizer.pt", "scheduler.pt")


def newest_whole(folder: Path, console: Console) -> Path:
    """Find the newest checkpoint in a run's output folder from which it can go on.

    Nothing is unpickled. A folder without Trainer's own state, which is written last, is one whose
    writing was cut off.

    Args:
        folder: what Trainer was given as ``output_dir``.
        console: where the choice is shown, and newer ones that are damaged.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint in it.
        ValueError: there are some, and none is whole.
    """
    every = sorted(_numbered(folder), reverse=True)
    for _, path in every:
        if _is_whole(path):
            console.print(f"Going on from {path}.", markup=False)
            return path
        console.print(f"{path} is damaged.", markup=False)
    if not every:
        raise FileNotFoundError(f"resume: expected a checkpoint in {folder}, found none.")
    raise ValueError(
        f"resume: expected a whole checkpoint in {folder}, but all {len(every)} are damaged; start "
        "without --resume in another folder."
    )


def make_room(folder: Path) -> None:
    """Remove what would pass for a new run's own: an earlier run's checkpoints, and weights."""
    for _, path in _numbered(folder):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (*STALE, CONFIG, WEIGHTS, PICKLE):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    names = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return [(int(step), path) for step, path in names if step.isdigit() and path.is_dir()]


def _is_whole(checkpoint: Path) -> bool:
    """Read every file that a resume reads to its end: by digests, checksums and syntax."""
    try:
        read_config(checkpoint)
        read_tensors(checkpoint / WEIGHTS)
        for name in (RUN, _STATE):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        states = [checkpoint / name for name in _ZIPS]
        for path in (*states, *checkpoint.glob("rng_state*.pth"), *checkpoint.glob("scaler.pt")):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return False
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile):
        return False
    return True
