"""Fixtures of the command's tests, also for methods of research."""

from __future__ import annotations

import pytest

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
