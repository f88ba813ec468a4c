"""finetune with every method: trained parameters, callbacks and invalid options."""

import dataclasses
import re

import pytest
import torch
from transformers import TrainerCallback

import rasa_ext
from rasa_ext import methods
from rasa_ext.nn.rasa_experts import RasaExpertWeight
from rasa_ext.patching.state import owners
from tests.helpers import experts
from tests.helpers.finetuning import (
    KNOWN,
    assert_same_runs,
    check_refused,
    interrupted,
    losses,
    options_of,
    parsed,
    run,
)
from tests.helpers.methods import rasa_linears
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base

CASES = {
    "rasa": ({"k": 1}, methods.RasaConfig(4, 1)),
    "lora": ({}, methods.LoraConfig(4, 8.0)),
    "lora, rslora": ({"rslora": "true"}, methods.LoraConfig(4, 8.0, rslora=True)),
    "lora, frozen": ({"train_A": "false"}, methods.LoraConfig(4, 8.0, train_A=False)),
}
KNOWN.update(CASES)


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["lora, frozen"])
def resumed(request) -> str:
    return request.param


@pytest.fixture(
    params=[
        ("lora", {"method": "rasa"}, "method ('lora' before, 'rasa' now)"),
        ("lora", {"train_A": "false"}, "train_A (None before, False now)"),
        ("rasa", {"k": 2}, "k (1 before, 2 now)"),
    ],
    ids=lambda param: next(iter(param[1])),
)
def another(request) -> tuple:
    """A case, options of a later run, and the error for them."""
    return request.param


def test_every_method_of_one_run_is_there():
    """CASES has all methods except those with their own training loop."""
    ours = {n: c for n, c in methods.every_method().items() if c.__module__.startswith("rasa_ext.")}
    trained = {name for name, each in ours.items() if not each.loop}
    assert trained == {name.partition(",")[0] for name in CASES}


def test_it_trains_what_the_method_trains(name, common, tmp_path):
    options = options_of(common, name, tmp_path)
    result, text = run(options)
    model = rasa_ext.load_adapter(make_model(), tmp_path)
    layers, expected = rasa_linears(model).values(), KNOWN[name][1]
    config = next(iter(layers)).config
    for field in dataclasses.fields(expected):
        if field.name not in ("target_modules", "exclude_modules"):
            assert getattr(config, field.name) == getattr(expected, field.name), field.name
    assert result["trainable"] == rasa_ext.summary(model).adapter
    assert f"effective rank {max(layer.effective_rank for layer in layers)})" in text

    torch.manual_seed(0)
    fresh = rasa_ext.patch_model(make_model(), config=parsed(options).config())
    assert not any(dW.any() for _, dW in rasa_ext.delta_weights(fresh))
    changed = [bool(dW.any()) for _, dW in rasa_ext.delta_weights(model)]
    assert all(changed)
    loss = [row[1] for row in losses(tmp_path)]
    assert min(loss[2:]) < loss[0]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(resumed, common, tmp_path):
    options = options_of(common, resumed, tmp_path / "out", dropout=0.1)
    run(options, output=str(tmp_path / "whole"))
    assert interrupted(2, options)[0]["interrupted"]
    run(options, resume=True)
    assert_same_runs(options["output"], tmp_path / "whole")


@dataclasses.dataclass(frozen=True)
class CountedConfig(methods.LoraConfig):
    """A LoRA that records the calls of its callbacks."""

    method = "counted"

    most: int = methods.option(9, "Layers that it takes.")

    def callbacks(self, model):
        layers = rasa_linears(model)
        noted.append(f"{len(layers)} layers on {next(model.parameters()).device}")
        if len(layers) > self.most:
            raise ValueError(f"most: expected at least {len(layers)}, got {self.most}.")
        return [Notes()]


class Notes(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **_):
        noted.append("step")

    def on_train_end(self, args, state, control, **_):
        noted.append("end")


noted: list[str] = []


def test_a_method_s_callbacks_take_part(common, tmp_path, monkeypatch):
    """Callbacks are created before weights are read; they see each step and the end of the run."""
    options = {"target_modules": "q_proj", "max_steps": 2}
    KNOWN["counted"] = {}, None
    noted.clear()
    whole = options_of(common, "counted", tmp_path / "out", **options)
    run(whole)
    made = ["2 layers on meta", "2 layers on cpu"]
    assert noted == [*made, "step", "step", "end"]
    noted.clear()
    run(whole, resume=True)
    assert noted == [*made, "end"]
    monkeypatch.delattr("rasa_ext.commands.training.load_model")
    refused = {**options, **{"most": "1"}}
    said = "most: expected at least 2, got 1"
    check_refused(common, "counted", refused, said, tmp_path / "no")


def test_another_adapter_is_not_resumed(another, common, tmp_path):
    name, changes, named = another
    options = options_of(common, name, tmp_path, max_steps=1)
    run(options)
    with pytest.raises(ValueError, match=re.escape(named)):
        run(options, max_steps=2, resume=True, **changes)


def test_a_mixture_of_experts(common, tmp_path):
    base = experts.model("qwen3_moe", vocab_size=320)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    output = tmp_path / "out"
    options = options_of(common, "rasa", output, model=str(tmp_path / "base"), experts="shared")
    _, text = run(options)
    model = rasa_ext.load_adapter(base, output)
    trained = sum(p.numel() for p in rasa_ext.adapter_parameters(model))
    assert f"{trained:,} of " in text
    stacks = {n: o for n, o in owners(model) if isinstance(o, RasaExpertWeight)}
    assert len(stacks) == 4
    assert all(stack.B.any() for stack in stacks.values())
    with pytest.raises(ValueError, match=re.escape("experts ('shared' before, 'slot' now)")):
        run(options, resume=True, experts="slot")


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows(tied, common, tmp_path):
    """Gradients also come through a tied head, of which the trainer reads only the weight."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    output = tmp_path / "out"
    never, often = 7, make_tokenizer().encode("1")[0]  # the first token is in no example
    indices = {"trainable_token_indices": [never, often]}
    run(options_of(common, "rasa", output, model=str(base), max_steps=2, **indices))
    model = rasa_ext.load_adapter(make_model(tie_word_embeddings=tied), output)
    rows = model.model.embed_tokens.rows
    moved = (rows - model.model.embed_tokens.base_layer.weight[[never, often]]).abs().amax(1)
    assert moved[1] > 1e-4
    assert (moved[0] > 1e-4) == tied  # tied: its logit is in every step's loss
    with pytest.raises(ValueError, match="trainable_token_indices: expected an integer, got '<"):
        run(options_of(common, "rasa", tmp_path / "new", trainable_token_indices=["<tool>"]))
