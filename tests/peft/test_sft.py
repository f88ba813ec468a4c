"""A RaSA config in TRL's SFTTrainer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import adapters, patched, same_bits
from tests.helpers.peft import layers, trained
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums
from tests.helpers.trainers import QUIET

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")


def trainer(model, directory, peft_config=None, **options):
    settings = {
        **QUIET,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "max_length": 64,
        "gradient_checkpointing": False,
        **options,
    }
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(directory), **settings),
        train_dataset=datasets.Dataset.from_list(sums(16)),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def train(model, directory, peft_config=None, **options) -> nn.Module:
    """Train four steps, check that the loss falls and all parameters move; return the model."""
    running = trainer(model, directory, peft_config, **options)
    before = {name: p.detach().clone() for name, p in trained(running.model).items()}
    running.train()
    losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = trained(running.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    return running.model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_config_is_all_it_takes(checkpointing, tmp_path):
    config = RasaConfig(r=4, task_type="CAUSAL_LM")
    model = train(make_model(), tmp_path, config, gradient_checkpointing=checkpointing)
    assert isinstance(model, PeftModel)
    assert len(layers(model)) == 14
    base = make_model().state_dict()
    for name, parameter in model.merge_and_unload().named_parameters():
        adapted = name.endswith("_proj.weight")
        assert same_bits(parameter.detach(), base[name]) != adapted, name


def test_an_adapted_output_head_is_trained(tmp_path):
    """The trainer's loss reads the head's weight and does not call the head."""
    model = patched(make_model(), target_modules=["q_proj", "lm_head"])
    twin = copy.deepcopy(model)
    options = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    running = trainer(model, tmp_path, per_device_train_batch_size=16, **options)
    twin(**next(iter(running.get_train_dataloader()))).loss.backward()
    running.train()
    for name, before in adapters(twin).items():
        for found, start in zip(adapters(model)[name], before, strict=True):
            torch.testing.assert_close(found, start - 1e-2 * start.grad)
