"""What the tests over trainers share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave what is there now to no collection of garbage within.

    accelerate collects whenever training begins: a second each, of what libraries have loaded.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
