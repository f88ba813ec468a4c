"""TRL's trainers with both front ends, compared to plain PyTorch RaSA in the same trainer.

All start with the same nonzero adapter, so the logged numbers differ if a trainer's reference
model wrongly contains the adapter, or if its policy lacks it.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import adapters, patched, plain_model, same_bits, trainable_copies
from tests.helpers.adapters import randomize as fill
from tests.helpers.peft import adapted, close, dense, logits, parameters, tiny, trained
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base
from tests.helpers.trainers import QUIET, rows, sft_trainer

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")

KINDS = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO")
DRAWING = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
HEAD = {"modules_to_save": ["score"]}
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save the base; trainers load the reference of models without PEFT from it."""
    return save_base(tmp_path_factory.mktemp("base"))


def load(kind: str, folder: Path, dtype=torch.float32) -> torch.nn.Module:
    if kind != "Reward":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(1)  # for the new head
    make = AutoModelForSequenceClassification.from_pretrained
    model = make(folder, num_labels=1, dtype=dtype)
    with torch.no_grad():
        model.score.weight.normal_()
    return model


def trainer(kind: str, model, directory: Path, peft_config=None, optimizer=None, **options):
    settings = {
        **QUIET,
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # Adam would turn a rounding error into a full step
        "max_grad_norm": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        **(DRAWING if kind in ("GRPO", "RLOO") else {}),
        **options,
    }
    more = {}
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **_: [float(len(set(c))) for c in completions]
    if optimizer is not None:
        more["optimizers"] = (optimizer, None)
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(str(directory), **settings),
        train_dataset=datasets.Dataset.from_list(rows(kind)),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        **more,
    )


def config(kind: str, **options) -> RasaConfig:
    """Return a config without modules_to_save: PEFT adds a new head itself."""
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    return RasaConfig(r=4, rasa_k=1, task_type=task, **options)


def over_peft(kind: str, folder: Path, directory: Path, dtype=torch.float32, **options):
    made = trainer(kind, load(kind, folder, dtype), directory, config(kind), **options)
    fill(made.model, 3)
    return made


def over_patch(kind: str, folder: Path, directory: Path, dtype=torch.float32, **options):
    head = HEAD if kind == "Reward" else {}
    return trainer(kind, patched(load(kind, folder, dtype), **head), directory, **options)


FRONT_ENDS = {"peft": over_peft, "patch": over_patch}


def over_plain(kind: str, folder: Path, directory: Path):
    """Return a trainer of the official formula, with the same base and initial adapter."""
    base = load(kind, folder)
    copies = trainable_copies(adapters(patched(base, **(HEAD if kind == "Reward" else {}))))
    model = plain_model(base, copies)
    parameters = {id(t): t for adapter in copies.values() for t in adapter if t is not None}
    if kind == "Reward":
        parameters[0] = model.score.weight.requires_grad_()
    return trainer(kind, model, directory, optimizer=Steps(parameters.values(), lr=0.05))


class Steps(torch.optim.SGD):
    """SGD that clears gradients itself: trainers clear only the model's own parameters."""

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


def train(running) -> list[dict[str, float]]:
    """Train and return each step's log, without times and the gradient norm."""
    torch.manual_seed(7)  # for sampled completions
    running.train()
    logged = running.state.log_history[:STEPS]
    assert len(logged) == STEPS
    return [
        {key: value for key, value in row.items() if "time" not in key and key != "grad_norm"}
        for row in logged
    ]


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """Plain PyTorch's log and final logits, computed once for each trainer."""

    @functools.cache
    def of(kind: str):
        running = over_plain(kind, folder, tmp_path_factory.mktemp(kind))
        return train(running), logits(running.model)

    return of


DISTANCES = {
    "DPO": ("rewards/margins", "rewards/chosen"),
    "KTO": ("kl", "rewards/rejected", "rewards/chosen"),
    "GRPO": ("kl",),
    "RLOO": ("kl",),
}
"""Logged values that are zero if the policy equals its reference."""


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_plain_pytorch_logs(kind, front_end, folder, expected, tmp_path):
    running = FRONT_ENDS[front_end](kind, folder, tmp_path)
    model = running.model
    before = {name: p.detach().clone() for name, p in parameters(model).items()}
    start = logits(model)
    logged = train(running)
    rows_, outputs = expected(kind)
    for row, wanted in zip(logged, rows_, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)
    assert (outputs - start).abs().max() > 1e-2  # training changed the model
    for key in DISTANCES.get(kind, ())[-1:]:  # so a wrong reference would be noticed
        assert abs(rows_[0][key]) > 1e-2
    learnt = trained(model)
    for name, parameter in parameters(model).items():
        assert same_bits(parameter.detach(), before[name]) != (name in learnt), name
        assert name not in learnt or "rasa" in name or front_end == "patch" or "score" in name


@pytest.mark.parametrize("tokens", [None, [3, 40]])
@pytest.mark.parametrize("kind", DISTANCES)
def test_the_reference_of_a_trained_adapter_is_that_adapter(kind, tokens, tmp_path):
    """TRL's adapter "ref" is a fixed copy of the adapter, not the bare base."""
    base = make_model(tie_word_embeddings=tokens is not None)
    model = adapted(base, task_type="CAUSAL_LM", trainable_token_indices=tokens)
    policy = logits(model)
    running = trainer(kind, model, tmp_path, max_steps=1)
    model.set_adapter("ref")
    reference = logits(model)
    model.set_adapter("default")
    running.train()
    logged = running.state.log_history[0]
    assert torch.equal(reference, policy)
    assert all(logged[key] == pytest.approx(0.0, abs=1e-6) for key in DISTANCES[kind])
    assert not torch.equal(logits(model), policy)
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)


def test_another_adapter_of_the_same_config_is_a_fresh_one():
    model = tiny()
    config = model.peft_config["default"]
    for name in ("other", "ref"):
        model.add_adapter(name, config if name == "other" else copy.deepcopy(config))
        model.set_adapter(name)
        close(logits(model), dense(model))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_float32_over_a_bfloat16_base(kind, front_end, folder, tmp_path):
    running = FRONT_ENDS[front_end](kind, folder, tmp_path, torch.bfloat16, max_steps=1)
    found = adapters(running.model)
    before = {name: adapter.map(lambda t: t.detach().clone()) for name, adapter in found.items()}
    running.train()
    for name, adapter in found.items():
        for now, then in zip(adapter, before[name], strict=True):
            assert now.dtype == torch.float32, name
            assert not torch.equal(now, then), name


def test_a_reward_model_s_head_is_saved_with_the_adapter(folder, tmp_path):
    """Both front ends train the head from its initial values and read each other's files."""
    ours, theirs = (make("Reward", folder, tmp_path / n) for n, make in FRONT_ENDS.items())
    for running in (ours, theirs):
        running.train()
    rasa_ext.save_adapter(theirs.model, tmp_path / "patch")
    ours.model.save_pretrained(tmp_path / "peft")
    for place, running in (("patch", theirs), ("peft", ours)):
        head = load("Reward", folder).score.weight
        loaded = rasa_ext.load_adapter(load("Reward", folder), tmp_path / place)
        assert not torch.equal(loaded.score.weight, head)
        assert torch.equal(logits(loaded), logits(running.model))
        loaded = PeftModel.from_pretrained(load("Reward", folder), tmp_path / place)
        assert torch.equal(logits(loaded), logits(running.model))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_rows_of_a_tied_head_are_trained(front_end, tmp_path):
    """The trainer's loss reads the head's weight and does not call the head."""
    base, tokens = make_model(tie_word_embeddings=True), [3, 40]
    if front_end == "peft":
        model = adapted(base, task_type="CAUSAL_LM", trainable_token_indices=tokens)
    else:
        model = patched(base, trainable_token_indices=tokens)
    twin = copy.deepcopy(model).train()
    options = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    running = sft_trainer(model, tmp_path, per_device_train_batch_size=16, **options)
    twin(**next(iter(running.get_train_dataloader()))).loss.backward()
    running.train()
    start = parameters(twin)
    (rows_,) = (n for n in trained(model) if n.endswith((".rows", "tokens_delta.default")))
    found = parameters(model)[rows_]
    torch.testing.assert_close(found, start[rows_] - 1e-2 * start[rows_].grad)
    assert not torch.equal(found, start[rows_])


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
