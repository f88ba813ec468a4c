"""Choosing the newest undamaged training checkpoint, and the message about damaged ones."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rasa_ext
from rasa_ext.commands.checkpoints import newest_whole
from tests.helpers.adapters import patched
from tests.helpers.tiny_lm import make_model


@pytest.fixture
def run(tmp_path) -> Path:
    """An output folder with checkpoints of steps 9 and 10, with Trainer's file names."""
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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path: Path) -> None:
    """Change the middle half of a file; the ends, which identify the format, stay."""
    data = path.read_bytes()
    quarter = len(data) // 4
    other = bytes(byte ^ 0xFF for byte in data[quarter:-quarter])
    path.write_bytes(data[:quarter] + other + data[-quarter:])


def found(run: Path) -> tuple[Path, str]:
    """Return the chosen checkpoint and the printed text."""
    text = io.StringIO()
    return newest_whole(run, Console(file=text, width=1000)), text.getvalue()


def test_the_newest_is_taken(run):
    assert found(run) == (run / "checkpoint-10", f"Resuming from {run / 'checkpoint-10'}.\n")


@pytest.mark.parametrize("damage", [cut, rot, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_damaged_newest_is_named_and_the_one_before_taken(name, damage, run):
    damage(run / "checkpoint-10" / name)
    last, before = run / "checkpoint-10", run / "checkpoint-9"
    assert found(run) == (before, f"{last} is damaged.\nResuming from {before}.\n")


@pytest.mark.parametrize(
    "name", ["rng_state.pth", "trainer_state.json", "adapter_config.json", "run.json"]
)
def test_small_files_that_are_cut(name, run):
    cut(run / "checkpoint-10" / name)
    assert found(run)[0] == run / "checkpoint-9"


def test_random_states_may_be_missing(run):
    """Trainer does not need them."""
    (run / "checkpoint-10" / "rng_state.pth").unlink()
    assert found(run)[0] == run / "checkpoint-10"


def test_none_is_whole(run):
    for step in (9, 10):
        cut(run / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match="but all 2 are damaged; start without --resume"):
        found(run)


def test_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint in .*found none"):
        found(tmp_path)
