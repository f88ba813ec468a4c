"""The demo on a tiny random model: files, comparison, and errors that stop it."""

from __future__ import annotations

import json
import re
import shlex

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rasa_ext.commands import demo
from rasa_ext.commands import models as model_loading
from rasa_ext.commands.app import app
from rasa_ext.commands.data import read_examples
from rasa_ext.commands.models import HUB_NAME, load_model, resolve
from rasa_ext.commands.problems import make_problems
from tests.helpers.tiny_lm import save_base

TINY = demo.DemoSize(steps=3, batch_size=4, held_out=5, lr=1e-2, max_new_tokens=4)


class Unread(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)

    def unload(self):
        return self.model


@pytest.fixture
def tiny_base(tmp_path, monkeypatch):
    base = str(save_base(tmp_path / "base"))
    monkeypatch.setattr(model_loading, "find_smollm2", lambda: base)
    return base


def test_the_whole_course(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHORT", TINY)
    words, out = ["demo", "--short", "--output"], tmp_path / "demo"
    done = CliRunner().invoke(app, [*words, str(out)])
    assert done.exit_code == 0, done.output
    for text in ("exact match", "loss per solution token", "before:", "after:", "loss.png"):
        assert text in done.output
    found = re.findall(r"(?:merged model|in PEFT) (\d\S*e-\d+)", done.output)
    assert len(found) == 2
    off = max(map(float, found))
    assert off < 1e-4
    summary = json.loads((out / "adapter" / "summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.1
    lora = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert lora["r"] == 8 - 1 + 2 * 1
    # Training uses the training split, evaluation the test split.
    for name, split, count in (("train", "train", 12), ("test", "test", 5)):
        rows = read_examples(str(out / f"{name}.jsonl"))
        asked = [row["messages"][1]["content"] for row in rows]
        assert asked == [p.question for p in make_problems(count, split=split, seed=0)]
    # The merged model must differ from the base, or the comparison would prove nothing.
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    tokens = torch.arange(10).view(1, 10)
    folded, plain = (m(tokens).logits for m in (merged, load_model(tiny_base, "float32")))
    assert (folded - plain).abs().max() > 100 * off
    next_steps = done.output.partition("Continue with the model")[2].splitlines()
    asked = next(line for line in next_steps if "rasa-ext generate" in line)
    again = CliRunner().invoke(app, shlex.split(asked)[1:])
    assert again.exit_code == 0, again.output
    assert make_problems(1, split="test")[0].question in again.output

    # The LoRA is not loaded, so the base is compared.
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda model, _: Unread(model))
    bad = CliRunner().invoke(app, [*words, str(tmp_path / "bad")])
    assert bad.exit_code == 1
    assert "Adapter, merged model and LoRA differ" in bad.output


def test_an_earlier_demo_is_only_deleted_when_asked_and_nothing_else_ever(tmp_path, tiny_base):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for words in ([], ["--overwrite"]):
        result = CliRunner().invoke(app, ["demo", "--short", "--output", str(out), *words])
        assert result.exit_code == 1
        assert "is not empty" in result.output
    assert (out / "thesis.txt").read_text() == "mine"


def test_the_wheel_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model_loading, "WHEEL", "some_wheel")
    assert resolve("smollm2") == HUB_NAME  # a wheel without a model in it
    (package / "model.Q4_1.gguf").write_bytes(b"")
    assert resolve("smollm2") == str(package / "model.Q4_1.gguf")
    assert resolve("another") == "another"
    monkeypatch.setattr(model_loading, "WHEEL", "no_such_wheel")
    assert resolve("smollm2") == HUB_NAME
