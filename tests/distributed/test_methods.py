"""Every method in two processes under DistributedDataParallel, against one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.methods import CASES, case
from tests.helpers.processes import WORKERS, launch

sys.path.insert(0, str(WORKERS))

import family


@pytest.fixture(scope="module")
def left(tmp_path_factory, forked_python) -> Path:
    """What two processes left."""
    directory: Path = tmp_path_factory.mktemp("family")
    meet = ("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")
    launch(forked_python, "torch.distributed.run", "family.py", directory, *meet)
    return directory


@pytest.fixture(scope="module")
def outputs(left) -> dict[str, torch.Tensor]:
    return torch.load(left / "outputs.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, outputs):
    torch.testing.assert_close(outputs[name], family.train(case(name)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [*family.CHANGES, *family.BOOSTERS])
def test_two_processes_change_an_adapter_as_one(name, outputs):
    """Whatever their own generators draw; ``change`` looks that their parameters are equal."""
    alone = family.change(name, "alone")
    for how in ("ddp", "shard") if name in family.DDP else ("shard",):
        torch.testing.assert_close(outputs[f"{name}, {how}"], alone, rtol=1e-9, atol=1e-11)


def test_what_ddp_cannot_follow_is_refused(left):
    said = json.loads((left / "refused.json").read_text())
    assert said.keys() == {"prune", "next_task", "absorb", "layers", "train_past"}
    for name in ("prune", "next_task", "absorb"):
        assert "model.module" in said[name]
    for name in ("layers", "train_past"):
        assert said[name].startswith(f"RuntimeError: {name}: ")
        assert "replicate_adapter" in said[name]
