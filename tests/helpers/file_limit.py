"""Limit the size of files, to simulate a full disk."""

import contextlib
import resource
import sys
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Make writes beyond ``size`` bytes of a file fail within the context.

    Writing bytecode is off: a module first imported here would leave a truncated .pyc file, since
    Python 3.11 does not check how much was written.
    """
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
