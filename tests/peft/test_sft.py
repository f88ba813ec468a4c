"""An adapted output head in TRL's SFTTrainer."""

from __future__ import annotations

import copy

import torch

from tests.helpers.adapters import adapters, patched
from tests.helpers.tiny_lm import make_model
from tests.helpers.trainers import sft_trainer


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
