"""DeepSpeed's ZeRO in two processes trains like one: `pytest -m engines tests/distributed`.

On first use, DeepSpeed is installed into a permanent folder beside the tests' packages
(tests/readers/environments.py). Its first run compiles an operator for gloo.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

import rasa_ext
from tests.helpers.processes import check_parity, torchrun
from tests.readers.environments import beside
from tests.workers import training, zero

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for ninja
    variables = {"PYTHONPATH": str(beside("deepspeed")), "PATH": programs}
    with mock.patch.dict(os.environ, variables, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
        directory = tmp_path_factory.mktemp("zero")
        torchrun(Path(sys.executable), "zero.py", directory)
        return directory


@pytest.mark.parametrize("name", zero.CASES)
def test_two_processes_train_as_one(name, trained, tmp_path, figure, record_property):
    said = trained / f"{name}.txt"
    assert not said.exists(), said.read_text()
    model, *steps = zero.alone(zero.CASES[name])
    rasa_ext.save_adapter(model, tmp_path)
    largest = check_parity(name, steps, training.CLIP, tmp_path, trained / name, figure)
    record_property(f"DeepSpeed, {name} in two processes", largest)


def test_reentrant_checkpoints_are_refused_where_a_pool_would_get_two_gradients(trained):
    said = (trained / "zero3-reentrant.txt").read_text()
    assert said.startswith("RuntimeError: expected checkpoints of use_reentrant=False")
