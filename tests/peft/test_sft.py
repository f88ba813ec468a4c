"""A RaSA config in TRL's SFTTrainer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import adapters, patched, same_bits
from tests.helpers.peft import layers
from tests.helpers.tiny_lm import make_model
from tests.helpers.trainers import sft_trainer, train_by_sft


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_config_is_all_it_takes(checkpointing, tmp_path):
    config = RasaConfig(r=4, task_type="CAUSAL_LM")
    model = train_by_sft(make_model(), tmp_path, config, gradient_checkpointing=checkpointing)
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
    running = sft_trainer(model, tmp_path, per_device_train_batch_size=16, **options)
    twin(**next(iter(running.get_train_dataloader()))).loss.backward()
    running.train()
    for name, before in adapters(twin).items():
        for found, start in zip(adapters(model)[name], before, strict=True):
            torch.testing.assert_close(found, start - 1e-2 * start.grad)
