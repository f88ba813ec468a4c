"""CSV files that grow by whole runs, so that interrupted work can resume."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Table:
    """A CSV file with fixed columns. Values are read as strings; an empty string means no value."""

    def __init__(self, path: Path | str, columns: Sequence[str]) -> None:
        """Set the file, which need not exist yet.

        Raises ValueError if the file exists with other columns, because one file holds one kind of
        row.
        """
        self.path = Path(path)
        self.columns = list(columns)
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                found = next(csv.reader(file), [])
            if found != self.columns:
                raise ValueError(
                    f"{self.path}: expected the columns {', '.join(self.columns)}, got "
                    f"{', '.join(found) or 'none'}; move the file away or change its columns."
                )

    def rows(self) -> list[dict[str, str]]:
        """Return all rows so far."""
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one run: all of them or, if the process dies, none.

        The whole file is written under another name and then renamed. A lock on the folder prevents
        two processes from losing each other's rows.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        for row in rows:
            writer.writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            before = ",".join(self.columns) + "\n"
            if self.path.is_file():
                before = self.path.read_text(encoding="utf-8")
            beside = self.path.with_name(self.path.name + ".part")
            with beside.open("w", encoding="utf-8", newline="") as file:
                file.write(before + text.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)

    @contextlib.contextmanager
    def claim(self, run: str) -> Iterator[bool]:
        """Claim ``run`` for this process while the context lasts, and yield whether that worked.

        The claim locks one byte of a file beside the table; the system unlocks it however the
        process ends. Claims exclude other processes only: a process can claim a run twice.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(self.path.name + ".lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(run.encode()))
            except OSError:
                yield False
            else:
                yield True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder`` within the context, after waiting for other processes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
