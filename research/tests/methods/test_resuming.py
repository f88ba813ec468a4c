"""Boosting and gates under transformers' Trainer, interrupted and resumed from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import rasa_ext
from rasa_research import methods, training
from tests.helpers.methods import WIDTHS, base, inputs

STOP, END = 3, 7


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"loss": (self.inner(x) - x.roll(1, 1)).square().mean()}


class SaveAdapter(TrainerCallback):
    """A callback that saves the adapter with every checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_save(self, args, state, control, **kwargs):
        rasa_ext.save_adapter(self.model, f"{args.output_dir}/adapter-{state.global_step}")


def boosting(model, optimizer):
    return training.Boosting(model, optimizer, steps=2, layers=3, seed=4)


def gates(model, optimizer):
    schedule = training.threshold_schedule(0.0, 0.05, stages=END, steps=1)
    return training.ProximalGates(model, schedule, l1=0.1)


CASES = {
    "boosting": (methods.BoostedLoraConfig(), boosting),
    "pool": (methods.BoostedPoolConfig(train_past=True), boosting),
    "gates": (methods.SoraConfig(4, alpha=8.0), gates),
}


def train(name, model, directory, resume=False, restore=False, callbacks=True):
    optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=1e-2)
    steps = CASES[name][1](model, optimizer)
    arguments = TrainingArguments(
        directory,
        max_steps=END,
        save_steps=STOP,
        per_device_train_batch_size=4,
        restore_callback_states_from_checkpoint=restore,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": torch.randn(WIDTHS[0], generator=torch.manual_seed(i))} for i in range(16)]
    trainer = Trainer(Model(model), arguments, train_dataset=data, optimizers=(optimizer, None))
    for callback in (steps.callback(), SaveAdapter(model)) if callbacks else ():
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{STOP}" if resume else None)


def fresh(name) -> nn.Module:
    return rasa_ext.patch_model(base(dtype=torch.float32), config=CASES[name][0])


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_ends_as_the_whole(name, restore, tmp_path):
    whole, x = fresh(name), inputs().float()
    train(name, whole, tmp_path)
    again = rasa_ext.load_adapter(base(dtype=torch.float32), tmp_path / f"adapter-{STOP}")
    train(name, again, tmp_path, resume=True, restore=restore)
    assert torch.equal(again(x), whole(x))


def test_without_the_boosters_a_resume_is_refused(tmp_path):
    train("boosting", fresh("boosting"), tmp_path)
    with pytest.raises(ValueError, match=r"expected a model with the 3 ranks.*load_adapter"):
        train("boosting", fresh("boosting"), tmp_path, resume=True)


@pytest.mark.parametrize("name", ["boosting", "gates"])
def test_a_checkpoint_without_the_state_is_refused(name, tmp_path):
    train(name, fresh(name), tmp_path, callbacks=False)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a checkpoint"):
        train(name, fresh(name), tmp_path, resume=True)
