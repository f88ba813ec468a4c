"""The core's tests in two processes, over every method of this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research.tests.distributed import family_worker
from research.tests.distributed.family_worker import FAMILY
from tests.distributed.test_methods import (  # noqa: F401 - tests, run here
    test_two_processes_change_an_adapter_as_one,
    test_two_processes_train_as_one,
)
from tests.helpers.processes import torchrun
from tests.workers.family import Change


@pytest.fixture(scope="module")
def left(tmp_path_factory, forked_python) -> Path:
    """The folder with the files of two processes."""
    directory = tmp_path_factory.mktemp("family")
    torchrun(forked_python, family_worker.__file__, directory)
    return directory


@pytest.fixture(params=FAMILY.cases)
def name(request) -> str:
    return request.param


@pytest.fixture(params=FAMILY.changes.items(), ids=lambda item: item[0])
def changed(request) -> tuple[str, Change]:
    return request.param


def test_what_ddp_cannot_follow_is_refused(left):
    said = json.loads((left / "refused.json").read_text())
    assert said.keys() == FAMILY.refused.keys()
    for name in ("next_task", "absorb", "prune"):
        assert "model.module" in said[name]
    for name in ("layers", "train_past"):
        assert said[name].startswith(f"RuntimeError: {name}: ")
        assert "one process" in said[name]
