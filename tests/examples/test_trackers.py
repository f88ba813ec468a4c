"""Trackers of transformers' Trainer get a patched model's losses."""

import pytest
import trackio
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

import rasa_ext
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums
from tests.helpers.trainers import QUIET


def losses(tracker: str, folder) -> list[float]:
    """Train three steps, and return the losses that Trainer's own log has."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(row["prompt"])["input_ids"] for row in sums(6)]
    rows = [{"input_ids": each, "labels": each} for each in ids]
    given = {**QUIET, "report_to": tracker, "per_device_train_batch_size": 1, "max_steps": 3}
    arguments = TrainingArguments(str(folder), run_name="run", project="tested", **given)
    trainer = Trainer(rasa_ext.patch_model(make_model()), arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    expected = losses("tensorboard", tmp_path / "out")
    (path,) = (tmp_path / "logs").rglob("events.*")
    written = EventAccumulator(str(path)).Reload().Scalars("train/loss")
    assert [event.value for event in written] == pytest.approx(expected)


def test_wandb(tmp_path, monkeypatch, request):
    request.addfinalizer(wandb.teardown)  # or else two threads would stay
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    kept = []
    run = wandb.sdk.wandb_run.Run  # wandb.log is its method, from init on
    monkeypatch.setattr(run, "log", lambda self, entry, **_: kept.append(entry))
    expected = losses("wandb", tmp_path / "out")
    assert [entry["train/loss"] for entry in kept if "train/loss" in entry] == expected
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    kept = []
    monkeypatch.setattr(trackio, "log", lambda entry, **_: kept.append(entry))
    expected = losses("trackio", tmp_path / "out")
    assert [entry["train/loss"] for entry in kept if "train/loss" in entry] == expected
