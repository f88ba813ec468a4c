"""A limit on the size of files, as on a disk that is full then."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes.

    A module that is first imported here would leave its bytecode cut off for all who come after:
    Python 3.11 does not look how much of it was written.
    """
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
