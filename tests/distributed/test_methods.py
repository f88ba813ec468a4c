"""Every method in two processes under DistributedDataParallel, against one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.methods import CASES
from tests.helpers.processes import WORKERS, launch

sys.path.insert(0, str(WORKERS))

import family


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, forked_python) -> dict[str, torch.Tensor]:
    directory: Path = tmp_path_factory.mktemp("family")
    meet = ("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")
    launch(forked_python, "torch.distributed.run", "family.py", directory, *meet)
    return torch.load(directory / "outputs.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, outputs):
    torch.testing.assert_close(outputs[name], family.train(name), rtol=1e-9, atol=1e-11)
