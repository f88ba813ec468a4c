"""Writing folders: all of a folder or nothing of it, and one sentence where that fails."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

STALE = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
"""A model's weights: those of an earlier one must not stay beside a new one's."""

_ANOTHER = "choose another folder"
_REASONS = {
    errno.ENOSPC: ("no space is left on its disk", f"free some space or {_ANOTHER}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space or {_ANOTHER}"),
    errno.EFBIG: (
        "a file would be too large for a limit of this system",
        f"raise the limit (ulimit -f) or {_ANOTHER}",
    ),
    errno.EROFS: ("its file system is read-only", _ANOTHER),
    errno.EACCES: ("this user has no permission", f"change the permissions or {_ANOTHER}"),
    errno.EPERM: ("this user has no permission", f"change the permissions or {_ANOTHER}"),
    errno.EEXIST: ("a file stands where a folder goes", f"move that file or {_ANOTHER}"),
    errno.ENOTDIR: ("a file stands where a folder goes", f"move that file or {_ANOTHER}"),
}
# Libraries in Rust tell the system's number in the text of an error of their own.
_RUST = re.compile(r"(?P<text>[^:]*) \(os error (?P<number>\d+)\)")
# torch.save tells none.
_TORCH = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")


class WriteError(OSError):
    """Files that could not be written: where, why, what is whole, and how to go on.

    ``errno`` and ``filename`` are the system's, and ``str()`` is one sentence.
    """

    def __str__(self) -> str:
        """Give the sentence alone."""
        return str(self.strerror)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], whole: str) -> Iterator[None]:
    """Turn whatever says within that a write failed into a `WriteError` about ``path``.

    ``whole`` tells, as a clause, what the failure has left as it was. Other errors pass.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        told = write_error(path, error, whole)
        if told is None:
            raise
        raise told from error


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that the system took no more bytes, whatever the file was."""
    number, text = _system_error(error)
    return text is not None and number in (
        0,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
    )


def write_error(
    path: str | os.PathLike[str], error: BaseException, whole: str
) -> WriteError | None:
    """Describe a failed write below ``path``; None where the error is of another kind.

    safetensors, tokenizers and torch each have errors of their own for what the system refused.
    """
    number, text = _system_error(error)
    if text is None:
        return None
    reason, cure = _REASONS.get(number, (text, _ANOTHER))
    if number in (errno.ENOSPC, errno.EDQUOT, 0):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_nearest(Path(path))).free
            reason += f" ({free / 2**20:,.1f} MiB are free)"
    sentence = f"{os.fspath(path)}: cannot be written, since {reason}; {whole}; {cure}."
    return WriteError(number, sentence, os.fspath(path))


def _system_error(error: BaseException) -> tuple[int, str | None]:
    """The system's number and words for an error; (0, words) where it tells no number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, f"the system says {str(error.strerror).lower()!r}"
    if match := _RUST.search(str(error)):
        return int(match["number"]), f"the system says {match['text'].strip().lower()!r}"
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _TORCH):
        return 0, "a file could not be written to its end; the disk may be full"
    return 0, None


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise where a command could not write ``output`` in the end: before its work, not after.

    Raises:
        ValueError: it holds files, and ``overwrite`` was not asked for.
        WriteError: it is a file, or this user cannot write there.
    """
    whole = "nothing was written"
    nearest = _nearest(output)
    if not nearest.is_dir():
        raise _refused(output, errno.ENOTDIR, whole)
    if nearest == output and not overwrite and any(output.iterdir()):
        raise ValueError(
            f"output: expected a new folder or an empty one, but {output} holds files; pass "
            "--overwrite to replace them, or choose another --output."
        )
    if not _may_write(nearest):
        read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        raise _refused(output, errno.EROFS if read_only else errno.EACCES, whole)


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _refused(path: Path, number: int, whole: str) -> WriteError:
    error = write_error(path, OSError(number, os.strerror(number)), whole)
    assert error is not None
    return error


@contextlib.contextmanager
def new_folder(output: Path, whole: str, stale: tuple[str, ...] = STALE) -> Iterator[Path]:
    """Give a temporary folder whose files become those of ``output`` if all within succeeds.

    A new folder appears by one rename. In one that is there already the files move one by one,
    each by a rename; old files of the patterns ``stale`` go, by default weights of an earlier
    model, and what else it holds stays. After an error before that the temporary folder is gone
    and ``output`` as it was. Files have the mode that the umask gives, which not every release of
    safetensors respects.

    Raises `WriteError`; ``whole`` tells, as a clause, what is whole beside ``output``.
    """
    fresh = not output.exists()
    whole += ", and nothing was left there" if fresh else ", and so is what was there"
    parent = output.parent if fresh else output
    with writing(output, whole), made(parent):
        temporary = parent / f".{output.name}.{uuid.uuid4().hex[:8]}.part"
        temporary.mkdir()
        try:
            yield temporary
            _give_usual_modes(temporary)
            if fresh:
                temporary.rename(output)
            else:
                _move_into(temporary, output, stale)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into(source: Path, target: Path, stale: tuple[str, ...]) -> None:
    names = {path.name for path in source.iterdir()}
    for path in sorted(source.iterdir()):
        os.replace(path, target / path.name)
    for pattern in stale:
        for path in target.glob(pattern):
            if path.name not in names:
                path.unlink()


def _give_usual_modes(folder: Path) -> None:
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; after an error within, those that were made are gone."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _nearest(path: Path) -> Path:
    """The path itself, or the first of its parents that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())
