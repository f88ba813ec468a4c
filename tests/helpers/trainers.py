"""What the tests over trainers share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

QUIET = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments of short trainings on a CPU, of which the log alone is looked at."""


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
