"""finetune with every method: what it trains, and options that do not fit it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import rasa_ext
from rasa_ext import methods
from rasa_ext.commands.options import FinetuneOptions
from rasa_ext.nn.rasa_experts import RasaBank
from rasa_ext.patching.state import owners
from tests.helpers import experts
from tests.helpers.finetuning import interrupted, losses, run
from tests.helpers.methods import rasa_linears
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base, sums, write_jsonl


def more(text: str) -> dict:
    """Other fields of the method's config, as the option takes them."""
    return {"method_options": text}


CASES = {
    "rasa": ({"k": 1}, methods.RasaConfig(4, 1)),
    "lora": ({}, methods.LoraConfig(4, 8.0)),
    "lora, rslora": (more("rslora: true"), methods.LoraConfig(4, 8.0, rslora=True)),
    "lora, frozen": (
        more("train_A: false"),
        methods.LoraConfig(4, 8.0, train_A=False),
    ),
    "block-lora": (more("blocks: 4"), methods.BlockLoraConfig(4, 8.0, 4)),
    "sbora": ({"seed": 3}, methods.SboraConfig(4, 8.0, seed=3)),
    "sbora, side": (more("side: B"), methods.SboraConfig(4, 8.0, side="B")),
    "sora": ({}, methods.SoraConfig(4, 8.0)),
    "sora, pool": ({"k": 1}, methods.SoraConfig(4, 8.0, 1)),
    "reslora": (more("window: 0"), methods.ResLoraConfig(4, 8.0, 0)),
    "sd-lora": ({}, methods.SdLoraConfig(4, 8.0)),
}


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    return {
        "model": str(save_base(tmp_path_factory.mktemp("base"))),
        "data": str(write_jsonl(folder / "train.jsonl", sums(22))),
        "rank": 4,
        "lr": 3e-3,
        "max_steps": 4,
        "batch_size": 2,
        "dtype": "float32",
    }


def options_of(common, name: str, output: Path, **changes) -> FinetuneOptions:
    method = {"method": name.partition(",")[0], "output": str(output)}
    return FinetuneOptions(**{**common, **method, **CASES[name][0], **changes})


def test_every_method_of_one_run_is_there():
    """But for those that want a loop of their own."""
    ours = {n: c for n, c in methods.every_method().items() if c.__module__.startswith("rasa_ext.")}
    trained = {name for name, each in ours.items() if not each.loop}
    assert trained == {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_it_trains_what_the_method_trains(name, common, tmp_path):
    options = options_of(common, name, tmp_path)
    result, text = run(options)
    model = rasa_ext.load_adapter(make_model(), tmp_path)
    layers, expected = rasa_linears(model).values(), CASES[name][1]
    config = next(iter(layers)).config
    for field in dataclasses.fields(expected):
        if field.name not in ("target_modules", "exclude_modules"):
            assert getattr(config, field.name) == getattr(expected, field.name), field.name
    assert result["trainable"] == rasa_ext.summary(model).adapter
    assert f"effective rank {max(layer.effective_rank for layer in layers)})" in text

    torch.manual_seed(options.seed)
    fresh = rasa_ext.patch_model(make_model(), config=options.adapter())
    assert not any(dW.any() for _, dW in rasa_ext.delta_weights(fresh))
    changed = [bool(dW.any()) for _, dW in rasa_ext.delta_weights(model)]
    assert all(changed)
    loss = [row[1] for row in losses(tmp_path)]
    assert min(loss[2:]) < loss[0]


def test_rates_are_the_method_s(common, tmp_path):
    """Block-LoRA with one block is a LoRA; with n its B moves n times as fast."""
    stored = {}
    for name, changes in (
        ("lora", {}),
        ("block-lora", more("blocks: 1")),
        ("block-lora", {**more("blocks: 2"), "rank": 8}),
    ):
        output = tmp_path / f"{name}{changes}"
        options = options_of(common, name, output, max_steps=1, **{"rank": 4, **changes})
        run(options, alpha=2.0 * options.rank)
        stored[output.name] = load_file(output / "adapter_model.safetensors")
    lora, one, two = stored.values()
    for key, tensor in lora.items():
        assert torch.equal(one[key], tensor)
        if key.endswith("_B"):  # of the first step's Adam, the sign of the gradient
            moved = tensor.abs() > 1e-4
            torch.testing.assert_close(two[key][moved], 2 * tensor[moved], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["rasa", "sora", "block-lora", "sbora", "reslora"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(name, common, tmp_path, monkeypatch):
    options = options_of(common, name, tmp_path / "out", dropout=0.1)
    run(options, output=str(tmp_path / "whole"))
    assert interrupted(monkeypatch, 2, options)[0]["interrupted"]
    run(options, resume=True)
    assert losses(options.output) == losses(tmp_path / "whole")
    ours, theirs = (
        load_file(Path(d) / "adapter_model.safetensors")
        for d in (options.output, tmp_path / "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rasa", {"method": "elora"}, "method: expected 'block-lora' or 'boosted-pool' or 'lora'"),
        ("rasa", {"method": "boosted-pool"}, "a loop of yours, by rasa_ext.training.Boosting"),
        (
            "lora",
            {"target_modules": "lm_head"},
            "target_modules: expected layers other than the out",
        ),
        ("lora", {"experts": "slot"}, "experts: expected None or 'own', got 'slot'"),
        ("rasa", {"experts": "all"}, "experts: expected None or 'slot' or 'layer' or 'shared'"),
        ("rasa", {"experts": "slot"}, "experts: expected a model with stacked experts"),
        ("lora", {"k": 0}, "k: expected none with the method 'lora', got 0"),
        (
            "rasa",
            more("rslora: true"),
            "rslora: expected none with the method 'rasa', got True",
        ),
        (
            "sora",
            more("train_A: no"),
            "train_A: expected none with the method 'sora', got False",
        ),
        (
            "lora",
            more("blocks: 2"),
            "blocks: expected none with the method 'lora', got 2",
        ),
        (
            "block-lora",
            more("blocks: 3"),
            "blocks: expected a divisor of the rank, which is 4",
        ),
        (
            "rasa",
            more("side: A"),
            "side: expected none with the method 'rasa', got 'A'",
        ),
        ("sbora", more("side: C"), "side: expected 'A' or 'B', got 'C'"),
        ("sbora", {"rank": 40}, "rank: expected at most the 32 inputs"),
        (
            "sd-lora",
            more("window: 1"),
            "window: expected none with the method 'sd-lora', got 1",
        ),
        ("lora", more("blocks"), "method_options: expected YAML such as"),
        ("lora", more("}"), "method_options: expected YAML such as"),
        ("reslora", more("window: -1"), "window: expected an integer >= 0, got -1"),
    ],
)
def test_options_that_do_not_fit(name, changes, message, common, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(options_of(common, name, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("lora", {"method": "rasa"}, "method ('lora' before, 'rasa' now)"),
        (
            "lora",
            more("train_A: false"),
            "method_options ('' before, 'train_A: false' now)",
        ),
        (
            "reslora",
            more("window: 1"),
            "method_options ('window: 0' before, 'window: 1' now)",
        ),
        ("rasa", {"k": 2}, "k (1 before, 2 now)"),
    ],
)
def test_another_adapter_is_not_resumed(name, changes, named, common, tmp_path):
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
    banks = {n: o for n, o in owners(model) if isinstance(o, RasaBank)}
    assert len(banks) == 4
    assert all(bank.B.any() for bank in banks.values())
    with pytest.raises(ValueError, match=re.escape("experts ('shared' before, 'slot' now)")):
        run(options, resume=True, experts="slot")


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows(tied, common, tmp_path):
    """The loss reaches them through the head as well, whose weight alone the trainer reads."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    output = tmp_path / "out"
    never, often = 7, make_tokenizer().encode("1")[0]  # the first is in no example
    indices = more(f"trainable_token_indices: [{never}, {often}]")
    run(options_of(common, "rasa", output, model=str(base), max_steps=2, **indices))
    model = rasa_ext.load_adapter(make_model(tie_word_embeddings=tied), output)
    rows = model.model.embed_tokens.rows
    moved = (rows - model.model.embed_tokens.base_layer.weight[[never, often]]).abs().amax(1)
    assert moved[1] > 1e-4
    assert (moved[0] > 1e-4) == tied  # as a logit, it is in every step
    with pytest.raises(TypeError, match="trainable_token_indices: expected integers"):
        options_of(common, "rasa", output, **more("trainable_token_indices: [<tool>]"))


def test_callbacks_of_a_method(common, tmp_path, monkeypatch):
    """Asked on the skeleton first; at the end of a run that is complete already, once more."""
    seen = []

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, state.max_steps))

    def callbacks(self, model):
        seen.append(next(model.parameters()).device.type)
        return [Ends()]

    monkeypatch.setattr(methods.LoraConfig, "callbacks", callbacks)
    options = options_of(common, "lora", tmp_path)
    run(options)
    assert seen == ["meta", "cpu", (4, 4)]
    run(options, resume=True)
    assert seen[3:] == ["meta", "cpu", (4, 4)]
