"""A PEFT model in transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import rasa_ext
from tests.helpers.adapters import patched, same_bits
from tests.helpers.peft import logits, named, tiny
from tests.helpers.tiny_lm import make_model
from tests.helpers.trainers import QUIET

CHECKPOINTING = [None, True, False]


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 320, (16, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(model, directory, reentrant=None, resume=None, **options):
    """The losses of six steps; ``reentrant`` is the kind of checkpointing, None for none."""
    settings = {
        **QUIET,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,  # a norm over all gradients depends on their order
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(reentrant)},
        **options,
    }
    trainer = Trainer(model, TrainingArguments(str(directory), **settings), train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
def test_the_same_losses_and_adapters_as_patch_model(reentrant, tmp_path):
    """Bit for bit: there is one implementation under both."""
    ours = patched(make_model())
    rasa_ext.save_adapter(ours, tmp_path / "start")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "start", is_trainable=True)
    base = {k: v.clone() for k, v in model.state_dict().items() if "rasa_" not in k}
    losses = train(model, tmp_path / "a", reentrant)
    assert losses == train(ours, tmp_path / "b", reentrant)
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(logits(model), logits(ours))
    state = model.state_dict()
    assert all(same_bits(state[key], base[key]) for key in base)


def test_a_merged_adapter_is_not_trained():
    model = tiny().train()
    tokens = torch.arange(8).view(1, 8)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"is merged .* unmerge_adapter\(\) of the PEFT model"):
        model(tokens)
    with torch.no_grad():
        model(tokens)
    model.unmerge_adapter()
    model(tokens)


@pytest.mark.parametrize("call", [rasa_ext.summary, rasa_ext.merge, rasa_ext.adapter_parameters])
def test_calls_for_patched_models_name_peft_s(call):
    with pytest.raises(ValueError, match=r"an unpatched PeftModel.*; call PEFT's own: .*save_pret"):
        call(tiny())


@pytest.mark.parametrize(("reentrant", "dropout"), [(None, 0.0), (False, 0.2)])
def test_a_resumed_run_has_identical_losses(reentrant, dropout, tmp_path):
    """Interrupted after three of six steps: losses and numbers as if it had not been."""
    options = {"rasa_dropout": dropout, "modules_to_save": ["lm_head"]}
    whole, resumed = tiny(**options), tiny(seed=4, **options)
    saving = {"save_strategy": "steps", "save_steps": 3}
    losses = train(whole, tmp_path, reentrant, **saving)
    checkpoint = tmp_path / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = train(resumed, tmp_path / "resumed", reentrant, resume=str(checkpoint), **saving)
    assert again == losses
    assert torch.equal(logits(resumed), logits(whole))
    for name, adapter in named(whole, "default").items():
        other = named(resumed, "default")[name]
        assert same_bits(adapter.d.detach(), other.d.detach())
    left, right = (
        load_file(place / "checkpoint-6" / "adapter_model.safetensors")
        for place in (tmp_path, tmp_path / "resumed")
    )
    assert left.keys() == right.keys()
    assert all(same_bits(left[key], right[key]) for key in left)
    for other in (PeftModel.from_pretrained, rasa_ext.load_adapter):
        assert torch.equal(logits(other(make_model(), tmp_path / "checkpoint-6")), logits(whole))
