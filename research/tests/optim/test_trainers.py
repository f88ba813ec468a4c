"""LoraPro in transformers' Trainer, over PEFT, and in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from rasa_research.optim import LoraPro
from research.tests.optim import worker
from tests.helpers.adapters import adapters, patched, same_adapters
from tests.helpers.peft import TOKENS, tiny, two
from tests.helpers.processes import torchrun
from tests.helpers.refusals import refused
from tests.helpers.tiny_lm import make_model


def train(directory: Path, moments: str, resume: bool | None = None, steps: int = 4):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 320, (16, 10), generator=generator)
    model = patched(make_model())
    optimizer = LoraPro(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0, moments=moments)
    arguments = TrainingArguments(
        str(directory),
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    if steps < 4:
        trainer.add_callback(worker.StopAfter(steps))
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, losses


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_trainer_and_going_on_from_its_checkpoint(moments, tmp_path):
    model, losses = train(tmp_path / "once", moments)
    assert losses[-1] < losses[0]
    train(tmp_path / "twice", moments, steps=2)
    again, _ = train(tmp_path / "twice", moments, resume=True)
    assert same_adapters(again, model)


def stepped(model):
    optimizer = LoraPro(model, torch.optim.SGD, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model


def test_an_adapter_of_peft():
    """In PEFT the parameters are equal and only their names differ, so the steps are equal."""
    ours, theirs = (adapters(stepped(model)) for model in (patched(make_model()), tiny()))
    for name, adapter in ours.items():
        twin = theirs[f"base_model.model.{name}"]
        assert all(torch.equal(a, b) for a, b in zip(adapter, twin, strict=True))


def test_the_active_adapter_of_several():
    model = two().train()
    model.set_adapter("second")
    before = {name: p.clone() for name, p in model.named_parameters()}
    stepped(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith(".second")}


def test_two_trained_adapters_are_refused():
    model = two().train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    refused(lambda: LoraPro(model, lr=1.0), model, "one trained adapter per layer")


def test_peft_s_own_lora_is_refused():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    refused(lambda: LoraPro(model, lr=1.0), model, "rasa_ext.import_lora")


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_two_processes_step_as_one(moments, tmp_path, forked_python, figure):
    torchrun(forked_python, worker.__file__, tmp_path, moments)
    alone = {n: p for n, p in worker.train(moments).named_parameters() if p.requires_grad}
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(first[name], second[name]) for name in alone)
    apart = max((first[name] - p).abs().max().item() for name, p in alone.items())
    figure(f"LoraPro, {moments}: two processes differ from one by {apart:.1e}")
    assert apart <= 1e-9
