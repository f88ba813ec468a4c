"""All methods train in two processes as in one."""

from pathlib import Path

import pytest
import torch

from tests.helpers.methods import CASES, case
from tests.helpers.processes import torchrun
from tests.workers import family

FAMILY = family.FAMILY


@pytest.fixture(scope="module")
def left(tmp_path_factory, forked_python) -> Path:
    """The output folder of two processes."""
    directory = tmp_path_factory.mktemp("family")
    torchrun(forked_python, "family.py", directory)
    return directory


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=FAMILY.changes.items(), ids=lambda item: item[0])
def changed(request) -> tuple[str, family.Change]:
    return request.param


def test_two_processes_train_as_one(name, left):
    outputs = torch.load(left / "outputs.pt")
    torch.testing.assert_close(outputs[name], family.train(case(name)), rtol=1e-9, atol=1e-11)


def test_two_processes_change_an_adapter_as_one(changed, left):
    """This holds for any random state of each process; ``change`` checks for equal parameters."""
    (name, change), outputs = changed, torch.load(left / "outputs.pt")
    alone = family.change(change, "alone")
    torch.testing.assert_close(outputs[f"{name}, ddp"], alone, rtol=1e-9, atol=1e-11)
