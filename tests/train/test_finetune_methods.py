"""finetune with every method: what it trains, its gates, and options that do not fit it."""

from __future__ import annotations

import dataclasses
import io
import re
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rasa_ext
from rasa_ext import methods
from rasa_ext.nn.rasa_experts import RasaBank
from rasa_ext.patching.state import owners
from rasa_ext.train import callbacks
from rasa_ext.train.callbacks import read_metrics
from rasa_ext.train.finetune import finetune
from rasa_ext.train.options import FinetuneOptions
from tests.helpers import experts
from tests.helpers.cli import invoke
from tests.helpers.methods import rasa_linears
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base, sums, write_jsonl


def more(text: str) -> dict:
    """Other fields of the method's config, as the option takes them."""
    return {"method_options": text}


CASES = {
    "rasa": ({"k": 1}, methods.RasaConfig(4, 1)),
    "rasa, gates": ({"k": 1, "gate_threshold": 1e-3}, methods.RasaConfig(4, 1, gates="pool")),
    "lora": ({}, methods.LoraConfig(4, 8.0)),
    "lora, rslora": (more("rslora: true"), methods.LoraConfig(4, 8.0, rslora=True)),
    "lora, frozen": (
        more("train_A: false"),
        methods.LoraConfig(4, 8.0, train_A=False),
    ),
    "sora": ({"gate_threshold": 1e-3}, methods.SoraConfig(4, 8.0)),
    "sora, pool": ({"gate_threshold": 1e-3, "k": 1}, methods.SoraConfig(4, 8.0, 1)),
}
KNOWN = dict(CASES)
"""Those that another package's tests have added, too."""


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["rasa, gates", "sora", "lora, frozen"])
def resumed(request) -> str:
    return request.param


@pytest.fixture(
    params=[
        ("lora", {"method": "rasa"}, "method ('lora' before, 'rasa' now)"),
        ("lora", more("train_A: false"), "method_options ('' before, 'train_A: false' now)"),
        ("rasa, gates", {"gate_threshold": None}, "gate_threshold (0.001 before, None now)"),
    ],
    ids=lambda param: param[0],
)
def another(request) -> tuple:
    """A case, options of a later run, and what is said of them."""
    return request.param


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
    return FinetuneOptions(**{**common, **method, **KNOWN[name][0], **changes})


def run(options: FinetuneOptions, **changes):
    text = io.StringIO()
    result = finetune(dataclasses.replace(options, **changes), Console(file=text, width=200))
    return result, text.getvalue()


def losses(directory: str | Path) -> list[float]:
    rows = read_metrics(Path(directory) / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def test_every_method_of_one_run_is_there():
    """But for those that want a loop of their own."""
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
    assert result.trainable == rasa_ext.summary(model).adapter
    assert f"effective rank {max(layer.effective_rank for layer in layers)})" in text

    torch.manual_seed(options.seed)
    fresh = rasa_ext.patch_model(make_model(), config=options.adapter())
    assert not any(dW.any() for _, dW in rasa_ext.delta_weights(fresh))
    changed = [bool(dW.any()) for _, dW in rasa_ext.delta_weights(model)]
    assert all(changed)
    loss = losses(tmp_path)
    assert min(loss[2:]) < loss[0]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    resumed, common, tmp_path, monkeypatch
):
    options = options_of(common, resumed, tmp_path / "out", dropout=0.1)
    run(options, output=str(tmp_path / "whole"))
    original = callbacks.InterruptCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.InterruptCallback, "on_step_end", interrupt)
        assert run(options)[0].interrupted
    run(options, resume=True)
    assert losses(options.output) == losses(tmp_path / "whole")
    ours, theirs = (
        load_file(Path(d) / "adapter_model.safetensors")
        for d in (options.output, tmp_path / "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["rasa, gates", "sora", "sora, pool"])
def test_gates_close_and_are_pruned(name, common, tmp_path):
    """Pruned or not, the two adapters are one function; the checkpoint keeps every rank."""
    large = {"gate_threshold": 0.2 if name.startswith("rasa") else 0.4, "max_steps": 6}
    whole = options_of(common, name, tmp_path / "whole", **large)
    result, text = run(whole)
    left, every = map(int, re.search(r"(\d+) of (\d+) gates are open\.", text).groups())
    assert left < every
    pruned = options_of(common, name, tmp_path / "pruned", prune=True, **large)
    _, text = run(pruned)
    after, before = map(int, re.search(r"rank is (\d+), from (\d+)", text).groups())
    assert after < before
    ids = torch.arange(1, 9).unsqueeze(0)
    models = [rasa_ext.load_adapter(make_model(), each.output) for each in (whole, pruned)]
    torch.testing.assert_close(*(model(ids).logits for model in models))
    ranks = [layer.effective_rank for layer in rasa_linears(models[1]).values()]
    assert max(ranks) == after
    assert result.trainable > rasa_ext.summary(models[1]).adapter
    _, text = run(pruned, resume=True)  # what is complete is pruned once more
    assert f"rank is {after}, from {before}" in text


def test_closed_altogether(common, tmp_path):
    options = options_of(common, "sora", tmp_path, gate_threshold=100.0, prune=True)
    _, text = run(options)
    assert "0 of 56 gates are open; with the others taken out the effective rank is 0" in text
    model = rasa_ext.load_adapter(make_model(), tmp_path).eval()
    ids = torch.arange(1, 9).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, make_model()(ids).logits)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rasa", {"method": "elora"}, "method: expected "),
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
        ("lora", more("blocks"), "method_options: expected YAML such as"),
        ("lora", more("}"), "method_options: expected YAML such as"),
        ("sora", {"gate_threshold": None}, "gate_threshold: expected a number with the method"),
        ("sora", {"gate_threshold": -1.0}, "gate_threshold: expected a number >= 0, got -1.0"),
        ("lora", {"gate_threshold": 0.1}, "gate_threshold: expected none with the method 'lora'"),
        ("rasa, gates", {"k": 0}, "gate_threshold: expected k above 0"),
        ("rasa", {"prune": True}, "prune: expected gate_threshold as well, got none"),
    ],
)
def test_options_that_do_not_fit(name, changes, message, common, tmp_path):
    check_refused(common, name, changes, message, tmp_path / "out")


def check_refused(common, name: str, changes: dict, message: str, output: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(options_of(common, name, output, **changes))
    assert not output.exists()


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
    banks = {n: o for n, o in owners(model) if isinstance(o, RasaBank)}
    assert len(banks) == 4
    assert all(bank.B.any() for bank in banks.values())
    with pytest.raises(ValueError, match=re.escape("experts ('shared' before, 'slot' now)")):
        run(options, resume=True, experts="slot")


def test_by_the_command(common, tmp_path):
    words = [
        word for key, value in common.items() for word in (f"--{key.replace('_', '-')}", value)
    ]
    gates = ("--method", "sora", "--gate-threshold", 0.4, "--prune")
    text = invoke("finetune", *words, *gates, "--output", tmp_path / "sora")
    assert "gates are open; with the others taken out" in text
    text = invoke("finetune", *words, "--method", "sora", "--output", tmp_path / "two", code=1)
    assert "gate_threshold: expected a number with the method 'sora'" in text


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows(tied, common, tmp_path):
    """The loss reaches them through the head as well, whose weight alone the trainer reads."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    output = tmp_path / "out"
    never, often = 7, make_tokenizer().encode("1")[0]  # the first is in no example
    indices = f"{never}, {often}"
    run(
        options_of(
            common, "rasa", output, model=str(base), trainable_token_indices=indices, max_steps=2
        )
    )
    model = rasa_ext.load_adapter(make_model(tie_word_embeddings=tied), output)
    rows = model.model.embed_tokens.rows
    moved = (rows - model.model.embed_tokens.base_layer.weight[[never, often]]).abs().amax(1)
    assert moved[1] > 1e-4
    assert (moved[0] > 1e-4) == tied  # as a logit, it is in every step
    with pytest.raises(ValueError, match="trainable_token_indices: expected integers separated"):
        options_of(common, "rasa", output, trainable_token_indices="<tool>")
