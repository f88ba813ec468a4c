"""Training checkpoints of a run: find the newest undamaged one, and remove old ones."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from rich.console import Console

from rasa_ext.checkpoint.files import PICKLE, WEIGHTS, read_config, read_tensors
from rasa_ext.writing import CONFIGS, STALE, TOKENIZER

# File with the run's options, number of processes and digest of the data, to compare on resume.
RUN = "run.json"
_STATE = "trainer_state.json"
# Files that torch.save writes are zip archives with a checksum for every entry.
_ZIPS = ("optimizer.pt", "scheduler.pt")


def newest_whole(folder: Path, console: Console) -> Path:
    """Find the newest undamaged checkpoint in a run's output folder.

    Nothing is unpickled. Trainer writes its state file last, so a folder without it is incomplete.

    Args:
        folder: Trainer's ``output_dir``.
        console: prints the chosen checkpoint, and newer ones that are damaged.

    Returns:
        The checkpoint's folder.

    Raises:
        FileNotFoundError: the folder has no checkpoint.
        ValueError: every checkpoint is damaged.
    """
    every = sorted(_numbered(folder), reverse=True)
    for _, path in every:
        if _is_whole(path):
            console.print(f"Resuming from {path}.", markup=False)
            return path
        console.print(f"{path} is damaged.", markup=False)
    if not every:
        raise FileNotFoundError(f"resume: expected a checkpoint in {folder}, found none.")
    raise ValueError(
        f"resume: expected an undamaged checkpoint in {folder}, but all {len(every)} are damaged; "
        "start without --resume in another folder."
    )


def make_room(folder: Path) -> None:
    """Remove an earlier run's checkpoints and model files, which could pass for the new run's."""
    for _, path in _numbered(folder):
        shutil.rmtree(path, ignore_errors=True)
    # transformers expects a whole model where a config.json is.
    for pattern in (*STALE, *TOKENIZER, *CONFIGS, WEIGHTS, PICKLE):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    names = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return [(int(step), path) for step, path in names if step.isdigit() and path.is_dir()]


def _is_whole(checkpoint: Path) -> bool:
    """Check the digest, checksums or syntax of every file that a resume reads."""
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
