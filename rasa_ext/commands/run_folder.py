"""A run's folder: one run at a time, its checkpoints, and what a run that continues must share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rasa_ext.checkpoint.files import PICKLE, WEIGHTS, read_config, read_tensors
from rasa_ext.commands.options import Options
from rasa_ext.commands.parsing import check_differs
from rasa_ext.writing import CONFIGS, STALE, TOKENIZER, created

# File with the run's options, number of processes and digest of the data, to compare on resume.
RUN = "run.json"
_STATE = "trainer_state.json"
# Files that torch.save writes are zip archives with a checksum for every entry.
_ZIPS = ("optimizer.pt", "scheduler.pt")


def check_output(options: Options) -> None:
    """Raise if this run must not write into its folder."""
    output, data = options.output, options.data
    if is_another():
        return  # the first process may have written by now
    trained = any(output.glob("checkpoint-*/trainer_state.json"))
    if trained and not (data.resume or data.overwrite):
        ways = "--resume continues it, --overwrite replaces it"
        raise ValueError(f"output: {output} holds checkpoints of an earlier run; {ways}.")
    sources = filter(None, (options.base.model_name_or_path, data.init_adapter))
    check_differs(sources, output, overwrite=data.resume or data.overwrite, beside=())


@contextlib.contextmanager
def reserved(output: Path, record: Path, *, new: bool) -> Iterator[None]:
    """Keep other runs out of a run's output folder, by a lock on its record.

    After an error that came before the first step, nothing is left there.
    Raises ValueError if another run has the folder.
    """
    if is_another():
        yield
        return
    with created(output), contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(record.open("x" if new else "a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError):
            raise ValueError(f"output: another run writes {output}; choose another.") from None
        try:
            yield
        finally:
            if not record.stat().st_size:
                record.unlink()


def is_another() -> bool:
    """Return whether this is another process than the first."""
    return os.environ.get("RANK", "0") != "0"


def processes() -> int:
    """Return how many processes torchrun, or accelerate, has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the options, if a checkpoint's run had other options or data.

    The checkpoint's steps used its own options, so a run that continues with others would match
    neither. For example, the learning rate falls to zero over the total number of steps.
    """
    before = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    other = [
        f"{name} ({before[name]!r} before, {value!r} now)"
        for name, value in record.items()
        if name in before and before[name] != value
    ]
    if other:
        raise ValueError(
            f"resume: the run of {checkpoint} had other options: {'; '.join(other)}; pass the same "
            "options, or another --output without --resume."
        )


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
