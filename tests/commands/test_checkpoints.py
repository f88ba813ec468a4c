"""The newest training checkpoint that is whole, and what is said of a newer one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import rasa_ext
from rasa_ext.commands.checkpoints import newest_whole
from tests.helpers.adapters import patched
from tests.helpers.tiny_lm import make_model


@pytest.fixture
def run(tmp_path) -> Path:
    """An output folder with checkpoints after steps 9 and 10, as Trainer names their files."""
    model = patched(make_model(), 4, 1)
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        rasa_ext.save_adapter(model, folder)
        optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model))
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save({"last_epoch": step}, folder / "scheduler.pt")
        torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
        (folder / "run.json").write_text(json.dumps({"rank": 4}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def test_the_newest_is_taken(run):
    found = newest_whole(run)
    assert (found.step, found.path, found.damaged) == (10, run / "checkpoint-10", {})
    assert str(found) == f"Going on from {run / 'checkpoint-10'}."


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path: Path) -> None:
    """Other bytes in the middle half; its ends, by which a format is known, stay."""
    data = path.read_bytes()
    quarter = len(data) // 4
    other = bytes(byte ^ 0xFF for byte in data[quarter:-quarter])
    path.write_bytes(data[:quarter] + other + data[-quarter:])


@pytest.mark.parametrize("damage", [cut, rot, Path.unlink])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_damaged_newest_is_named_and_the_one_before_taken(name, damage, run):
    damage(run / "checkpoint-10" / name)
    found = newest_whole(run)
    if (name, damage) == ("rng_state.pth", Path.unlink):  # Trainer goes on without it
        assert found.step == 10
        return
    assert (found.step, found.path) == (9, run / "checkpoint-9")
    assert list(found.damaged) == [run / "checkpoint-10"]
    told = str(found)
    assert re.search(rf"checkpoint-10 is damaged: .*{name}", told)
    assert told.endswith(f"Going on from {run / 'checkpoint-9'}, the one before it.")
    assert "weights_only" not in told


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_config.json", "run.json"])
def test_settings_that_do_not_parse(name, run):
    cut(run / "checkpoint-10" / name)
    assert newest_whole(run).step == 9


def test_none_is_whole(run):
    for step in (9, 10):
        cut(run / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"all are damaged .*checkpoint-10.*; .*checkpoint-9"):
        newest_whole(run)


def test_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint in .*found none"):
        newest_whole(tmp_path)
