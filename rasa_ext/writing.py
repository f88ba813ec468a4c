"""Atomic writing of folders, and one-sentence errors if it fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

STALE = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
"""Weights of an earlier model, which must not stay beside new ones."""

TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"),
    "additional_chat_templates",  # a folder
)
"""Files of a tokenizer; old ones are removed, since readers would mix them with a new tokenizer."""

INSIDE, NEW, OLD = "saving", "new", "old"
"""Names of the temporary folder within the output folder, and of the two folders in it."""

CONFIG = "adapter_config.json"
CONFIGS = (CONFIG, "config.json")
"""Configs, without which no reader reads a folder."""

WRITTEN = (*CONFIGS, *STALE, *TOKENIZER, "README.md", "adapter*.safetensors", "adapter.gguf")
"""Names of what the package writes into a folder that exists."""

_PATIENCE = 10.0  # seconds; a lock is held while a few files are renamed

_FULL = (errno.ENOSPC, errno.EDQUOT, 0)  # 0: the error has no number
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or "),
    errno.EFBIG: "raise the limit (ulimit -f) or ",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change the permissions or "),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "move the file that is there or "),
}
"""What to do about a system error, other than choosing another folder."""
# Rust libraries have the system's number in their own error's text; torch has none.
_RUST = re.compile(r" \(os error (\d+)\)")
_TORCH = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")


class WriteError(OSError):
    """Error for files that could not be written: where, why, what is intact, and what to do.

    ``errno`` and ``filename`` are the system's, and ``str()`` is one sentence.
    """

    def __str__(self) -> str:
        """Return the sentence alone."""
        return str(self.strerror)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], whole: str) -> Iterator[None]:
    """Turn an error of a failed write into a `WriteError` about ``path``.

    ``whole`` is a clause on what the failure left unchanged. Other errors pass.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        described = write_error(path, error, whole)
        if described is None:
            raise
        raise described from error


def is_full(error: BaseException) -> bool:
    """Return whether an error means that no file can be written, such as on a full disk."""
    return _number(error) in (*_FULL, errno.EFBIG, errno.EROFS)


def write_error(
    path: str | os.PathLike[str], error: BaseException, whole: str
) -> WriteError | None:
    """Describe a failed write below ``path``, or return None for other errors.

    safetensors, tokenizers and torch each raise errors of their own for system errors.
    """
    number = _number(error)
    return None if number is None else _described(path, number, whole)


def _described(path: str | os.PathLike[str], number: int, whole: str) -> WriteError:
    reason = os.strerror(number).lower() if number else "the disk may be full"
    if number in _FULL:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_nearest(Path(path))).free
            reason += f" ({free / 2**20:,.1f} MiB are free)"
    cure = f"{_CURES.get(number, '')}choose another folder"
    sentence = f"{os.fspath(path)}: cannot be written: {reason}; {whole}; {cure}."
    return WriteError(number, sentence, os.fspath(path))


def _number(error: BaseException) -> int | None:
    """Return the system's number of a failed write, 0 if it has none, or None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := _RUST.search(str(error)):
        return int(match[1])
    cut = isinstance(error, RuntimeError) and any(mark in str(error) for mark in _TORCH)
    return 0 if cut else None


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise, before a command's work, if ``output`` could not be written afterwards.

    Raises:
        ValueError: it holds files, and ``overwrite`` is False.
        WriteError: it is a file, or this user cannot write there.
    """
    nearest, number = _nearest(output), 0
    if not nearest.is_dir():
        number = errno.ENOTDIR
    elif nearest == output and not overwrite and any(output.iterdir()):
        raise ValueError(
            f"output: expected a new folder or an empty one, but {output} holds files; pass "
            "--overwrite to replace an earlier model there, or choose another --output."
        )
    elif not _may_write(nearest):
        number = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise _described(output, number, "nothing was written")


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def new_folder(output: Path, whole: str = "", stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder whose files move to ``output`` if the context succeeds.

    A new folder appears by one rename. In an existing folder the files replace old files of their
    names, folders replace folders, and what matches ``stale`` is removed. Other files stay. After
    an error ``output`` is unchanged. If the process is killed midway, a folder has all old files or
    all new ones, or no config until the next save restores the old files.

    The temporary folder is new, so no link in ``output`` is written through. Files get the mode of
    the umask, which not every release of safetensors respects, and are on the disk before the first
    of them moves.

    Raises `WriteError`; ``whole`` is a clause on what else is unchanged.
    """
    fresh = not output.exists()
    left = "nothing was left there" if fresh else "the files there are unchanged"
    parent, name = (output.parent, output.name) if fresh else (output, INSIDE)
    temporary = parent / f".{name}.{uuid.uuid4().hex}.part"
    with (
        writing(output, f"{whole}, and {left}" if whole else left),
        created(parent),
        contextlib.ExitStack() as living,
    ):
        with _locked(parent):
            (temporary / NEW).mkdir(parents=True)
            living.enter_context(_locked(temporary))  # held while this process lives
        try:
            yield temporary / NEW
            _flush(temporary / NEW)
            with _locked(parent):
                _clear(parent, name, output)
                _put(temporary / NEW, output, stale)
        finally:
            if not (temporary / OLD).exists():
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the system's lock on a folder, which ends with the process; yield whether it is held.

    It is not if the file system has no locks, or another process holds it longer than any save.
    """
    last = time.monotonic() + (_PATIENCE if wait else 0)
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            while not held:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                except BlockingIOError:
                    if time.monotonic() >= last:
                        raise
                    time.sleep(0.01)
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # for forked processes, too
        yield held


def _clear(parent: Path, name: str, output: Path) -> None:
    """Remove temporary folders of killed processes, after moving files of ``output`` back."""
    for part in parent.glob(f".{glob.escape(name)}.*.part"):
        if part.is_symlink() or (part / OLD).is_symlink():
            continue
        with _locked(part, wait=False) as dead:
            if dead:
                if any(part.glob(f"{NEW}/*")) and (part / OLD).is_dir():  # unfinished
                    # The folder may have come with files of others, who choose what is in it.
                    _put_back(part / OLD, output, WRITTEN)
                shutil.rmtree(part, ignore_errors=True)


def _put(source: Path, target: Path, stale: tuple[str, ...]) -> None:
    """Move the files of a folder to ``target``."""
    if source.parent.parent == target:
        return _exchange(source, target, stale)
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        with _locked(target):  # another process created it meanwhile
            _exchange(source, target, stale)


def _exchange(source: Path, target: Path, stale: tuple[str, ...]) -> None:
    """Exchange new and old files: the old config moves first, the new config last."""
    new, old = _in_order(source), source.parent / OLD
    leaving = [target / path.name for path in reversed(new)]
    leaving += [path for pattern in stale for path in target.glob(pattern)]
    old.mkdir()
    try:
        for path in dict.fromkeys(leaving):
            stays = path.is_dir() and not path.is_symlink() and (source / path.name).is_file()
            if os.path.lexists(path) and not stays:
                os.replace(path, old / path.name)
        for path in new:
            os.replace(path, target / path.name)
    except BaseException:
        for path in new:
            if not path.exists():
                os.replace(target / path.name, path)
        _put_back(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, target: Path, over: tuple[str, ...] = ("*",)) -> None:
    """Move old files back, replacing only new ones whose names match ``over``."""
    for path in _in_order(old):
        there = target / path.name
        if os.path.lexists(there) and not any(fnmatch(path.name, pattern) for pattern in over):
            continue
        if path.is_dir():  # the new one may be there
            shutil.rmtree(there, ignore_errors=True)
        os.replace(path, there)
    shutil.rmtree(old)


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: (path.name in CONFIGS, path.name))


def _flush(folder: Path) -> None:
    """Give files the umask's mode, and flush them to the disk."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def created(folder: Path) -> Iterator[None]:
    """Create a folder and missing parents; after an error within, remove what was created."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _nearest(path: Path) -> Path:
    """Return the path itself, or the nearest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
