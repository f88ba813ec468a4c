"""Trainers for tests: quiet arguments, and TRL's SFTTrainer over a few sums."""

import pytest
import torch
from torch import nn

from tests.helpers.peft import trained
from tests.helpers.tiny_lm import make_tokenizer, sums

QUIET = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments for short trainings on a CPU, of which tests read only the log."""


def rows(kind: str) -> list[dict]:
    """Return eight sums as data of one of TRL's trainers."""
    found = sums(8)
    for i, row in enumerate(found):
        if kind in ("DPO", "Reward"):
            row.update(chosen=row.pop("completion"), rejected=f" {i}")
        elif kind == "KTO":
            row.update(label=i % 2 == 0)
        elif kind in ("GRPO", "RLOO"):
            del row["completion"]
        if kind == "Reward":
            prompt = row.pop("prompt")
            row.update({key: prompt + row[key] for key in ("chosen", "rejected")})
    return found


def sft_trainer(model, directory, peft_config=None, **options):
    """Return TRL's SFTTrainer for four steps over sums; skip the test where TRL is missing."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
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


def train_by_sft(model, directory, peft_config=None, **options) -> nn.Module:
    """Train four steps, check that the loss falls and all parameters move; return the model."""
    running = sft_trainer(model, directory, peft_config, **options)
    before = {name: p.detach().clone() for name, p in trained(running.model).items()}
    running.train()
    losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = trained(running.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    return running.model
