"""PEFT models in transformers' Trainer, with adapted linear layers or experts."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

import rasa_ext
from rasa_ext.peft import RasaConfig, RasaPeftLinear
from tests.helpers.adapters import same_bits
from tests.helpers.peft import tiny, trained
from tests.helpers.peft_sides import LINEAR, Side, sides
from tests.helpers.tiny_lm import make_model
from tests.helpers.trainers import QUIET


def wide(side: Side) -> dict:
    """Return options for a vocabulary that fits the rows and a dtype that Adam can train."""
    return {} if side is LINEAR else {"dtype": torch.float32, "vocab_size": 320}


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 320, (16, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(model, directory, reentrant=None, resume=None, **options):
    """Train six steps, with ``reentrant`` checkpointing or none (None); return the losses."""
    settings = {
        **QUIET,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,  # a norm over all gradients depends on parameter order
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(reentrant)},
        **options,
    }
    trainer = Trainer(model, TrainingArguments(str(directory), **settings), train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [None, True, False])
@sides("mixtral")
def test_the_same_losses_and_adapters_as_patch_model(side, reentrant, tmp_path):
    """Results are bit-identical: both front ends share one implementation."""
    model = side.one(**wide(side))
    model.save_pretrained(tmp_path / "start")
    ours = rasa_ext.load_adapter(side.base(**wide(side)), tmp_path / "start")
    base = {k: v.clone() for k, v in model.state_dict().items() if "rasa_" not in k}
    losses = train(model, tmp_path / "a", reentrant)
    assert losses == train(ours, tmp_path / "b", reentrant)
    assert losses[-1] < (0.9 if side is LINEAR else 0.96) * losses[0]
    assert torch.equal(side.logits(model), side.logits(ours))
    state = model.state_dict()
    assert all(same_bits(state[key], base[key]) for key in base)


@sides("mixtral")
def test_a_merged_adapter_is_not_trained(side):
    model = side.one().train()
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, RasaPeftLinear) and side is not LINEAR:
            module.eval()  # so that the error comes from the experts
    with pytest.raises(RuntimeError, match=r"is merged .* unmerge_adapter\(\) of the PEFT model"):
        model(side.tokens)
    with torch.no_grad():
        model(side.tokens)
    model.unmerge_adapter()
    model(side.tokens)


@pytest.mark.parametrize("call", [rasa_ext.summary, rasa_ext.merge, rasa_ext.adapter_parameters])
def test_calls_for_patched_models_name_peft_s(call):
    said = r"an unpatched PeftModel.*; call PEFT's methods: .*save_pret"
    with pytest.raises(ValueError, match=said):
        call(tiny())


@pytest.mark.parametrize(("reentrant", "dropout"), [(None, 0.0), (False, 0.2)])
@sides("mixtral")
def test_a_resumed_run_has_identical_losses(side, reentrant, dropout, tmp_path):
    """A run resumed after three of six steps equals an uninterrupted one."""
    options = {"rasa_dropout": dropout, "modules_to_save": ["lm_head"], **wide(side)}
    whole, resumed = side.one(**options), side.one(**options)
    with torch.no_grad():
        for parameter in trained(resumed).values():
            parameter.zero_()
    saving = {"save_strategy": "steps", "save_steps": 3}
    losses = train(whole, tmp_path, reentrant, **saving)
    checkpoint = str(tmp_path / "checkpoint-3")
    assert train(resumed, tmp_path / "again", reentrant, resume=checkpoint, **saving) == losses
    assert torch.equal(side.logits(resumed), side.logits(whole))
    name = "checkpoint-6/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for load in (PeftModel.from_pretrained, rasa_ext.load_adapter):
        again = load(side.base(**wide(side)), tmp_path / "checkpoint-6")
        assert torch.equal(side.logits(again), side.logits(whole))


@pytest.mark.parametrize("front", ["ours", "peft"])
def test_lora_plus_and_the_rate_of_d(front):
    base = make_model()
    if front == "ours":
        model = rasa_ext.patch_model(base, rank=4, k=1)
    else:
        model = get_peft_model(base, RasaConfig(r=4, rasa_k=1))
    options = {"loraplus_lr_ratio": 16.0, "d_lr_ratio": 0.5, "weight_decay": 0.1}
    groups = rasa_ext.training.parameter_groups(model, 1e-3, **options)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {"A": 1e-3, "B": 16e-3, "d": 0.5e-3}
    seen = set()
    for name, parameter in trained(model).items():
        kind = name.removesuffix(".default").rpartition(".")[2].rpartition("_")[2]
        seen.add(kind)
        assert rates.pop(id(parameter)) == pytest.approx(expected[kind])
    assert not rates
    assert seen == {"A", "B", "d"}
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_lora_plus_of_peft_is_refused():
    model = get_peft_model(make_model(), RasaConfig(r=4))
    options = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16.0}
    with pytest.raises(ValueError, match=r"model: .*loraplus_lr_ratio"):
        create_loraplus_optimizer(model, **options)
    lora = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    rates = {group["lr"] for group in create_loraplus_optimizer(lora, **options).param_groups}
    assert rates >= {1e-3, 16e-3}


def test_a_rate_of_a_tensor_that_is_not_trained():
    model = rasa_ext.patch_model(make_model(), config=rasa_ext.methods.LoraConfig(rank=2))
    with pytest.raises(ValueError, match="d_lr_ratio"):
        rasa_ext.training.parameter_groups(model, 1e-3, d_lr_ratio=2.0)
    with pytest.raises(ValueError, match="model"):
        rasa_ext.training.parameter_groups(torch.nn.Linear(2, 2), 1e-3)
