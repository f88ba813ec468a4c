"""TRL's trainers that hold the policy against a reference, given an adapter that was trained.

They add an adapter "ref" for it; at the first step it must be the policy, and not the bare base.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers.peft import close, dense, logits, tiny
from tests.helpers.tiny_lm import make_tokenizer, sums

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(set(text))) for text in completions]


def rows(kind: str) -> list[dict]:
    found = sums(8)
    for i, row in enumerate(found):
        if kind == "DPO":
            row.update(chosen=row.pop("completion"), rejected=" 1")
        elif kind == "KTO":
            row.update(label=i % 2 == 0)
        else:
            del row["completion"]
    return found


# Settings, and what a trainer logs of the distance between policy and reference, with its start.
TRAINERS = {
    "DPO": ({}, {"rewards/margins": 0.0, "rewards/chosen": 0.0}),
    "KTO": ({}, {"kl": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}),
    "GRPO": ({"num_generations": 2, "max_completion_length": 6, "beta": 0.1}, {"kl": 0.0}),
    "RLOO": ({"num_generations": 2, "max_completion_length": 6, "beta": 0.1}, {"kl": 0.0}),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_reference_is_the_policy(kind, tmp_path):
    options, expected = TRAINERS[kind]
    settings = getattr(trl, f"{kind}Config")(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    model = tiny()
    policy = logits(model)
    more = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows(kind)),
        processing_class=make_tokenizer(),
        **more,
    )
    model.set_adapter("ref")
    reference = logits(model)
    model.set_adapter("default")
    trainer.train()
    logged = trainer.state.log_history[0]
    assert torch.equal(reference, policy)
    assert {key: logged[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert not torch.equal(logits(model), policy)
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)  # which stays


def test_another_adapter_of_the_same_config_is_a_fresh_one():
    model = tiny()
    config = model.peft_config["default"]
    for name in ("other", "ref"):
        model.add_adapter(name, config if name == "other" else copy.deepcopy(config))
        model.set_adapter(name)
        close(logits(model), dense(model))
