"""Fixtures of the command's tests, also for methods of research."""

from pathlib import Path

import pytest

from tests.helpers.finetuning import Given, small_options
from tests.helpers.tiny_lm import save_base, sums, write_jsonl


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> dict:
    """Options that all cases of finetune share."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "model": str(save_base(tmp_path_factory.mktemp("base"))),
        "data": str(write_jsonl(folder / "train.jsonl", sums(22))),
        "rank": 4,
        "lr": 3e-3,
        "max_steps": 4,
        "batch_size": 2,
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_jsonl(directory / "train.jsonl", sums(22))
    write_jsonl(directory / "test.jsonl", sums(40)[30:])
    return directory


@pytest.fixture
def options(base, files, tmp_path) -> Given:
    # 22 rows in batches of 2, two per step: the sixth step of an epoch has a single batch.
    return small_options(base, files, tmp_path / "out", max_steps=9, grad_accum=2, dtype="float32")
