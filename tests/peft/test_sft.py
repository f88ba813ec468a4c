"""A RaSA config in TRL's SFTTrainer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import same_bits
from tests.helpers.peft import layers, logits, tiny
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums
from tests.helpers.trainers import QUIET

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")


def train(model, directory, checkpointing=False, resume=None, peft_config=None, **options):
    settings = {
        **QUIET,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "max_length": 64,
        "gradient_checkpointing": checkpointing,
        **options,
    }
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(directory), **settings),
        train_dataset=datasets.Dataset.from_list(sums(16)),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_config_is_all_it_takes(checkpointing, tmp_path):
    config = RasaConfig(r=4, task_type="CAUSAL_LM")
    model, losses = train(make_model(), tmp_path, checkpointing, peft_config=config)
    assert isinstance(model, PeftModel)
    assert len(layers(model)) == 14
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for name, layer in layers(model).items():
        _, _, B, B_pool, _ = layer.adapter().factors()
        assert B.any(), name
        assert B_pool.any(), name
    base = make_model().state_dict()
    for name, parameter in model.merge_and_unload().named_parameters():
        adapted = name.endswith("_proj.weight")
        assert same_bits(parameter.detach(), base[name]) != adapted, name


def test_checkpointing_changes_nothing(tmp_path):
    _, plain = train(tiny(), tmp_path)
    _, checkpointed = train(tiny(), tmp_path, checkpointing=True)
    assert checkpointed == pytest.approx(plain, rel=1e-4)


def test_a_resumed_run_has_identical_losses(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    start = tiny(rasa_dropout=0.2)
    whole, losses = train(copy.deepcopy(start), tmp_path, **saving)
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed, again = train(start, tmp_path / "resumed", resume=checkpoint, **saving)
    assert again == losses
    assert torch.equal(logits(resumed), logits(whole))
    saved = PeftModel.from_pretrained(make_model(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(saved), logits(whole))
