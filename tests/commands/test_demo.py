"""The demo on a tiny random model: files, comparison, and errors that stop it."""

import json
import re
import shlex
import subprocess
import sys

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
from rasa_ext.commands.problems import LARGEST, SCENES, make_problems, scenes_of, split_of
from tests.helpers import oracle
from tests.helpers.finetuning import read_result
from tests.helpers.tiny_lm import save_base

TINY = demo.DemoSize(steps=3, batch_size=4, held_out=5, lr=1e-2, max_new_tokens=4)


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
    found = re.findall(r"(?:merged model|in PEFT) (\d[\d.e+-]*)", done.output)
    assert len(found) == 2
    off = max(map(float, found))
    plain = AutoModelForCausalLM.from_pretrained(out / "merged")
    error = oracle.rounding(plain, lambda model: model(torch.arange(64).view(1, 64)).logits)
    assert off <= 8 * error
    summary = read_result(out / "adapter")
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

    def unread(model, _):
        """Load no LoRA, so that the base is compared."""
        model.unload = lambda: model
        return model

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", unread)
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


TRAIN = make_problems(600, split="train", seed=1)
TEST = make_problems(200, split="test", seed=1)


@pytest.mark.parametrize("problem", [*TRAIN[:100], *TEST[:100]], ids=lambda p: p.working)
def test_the_question_has_the_numbers_and_the_working_the_answer(problem):
    told = sorted(map(int, re.findall(r"\d+", problem.question)))
    assert told == sorted(problem.numbers)
    steps = [step.split("=") for step in problem.working.split(", ")]
    assert len(steps) == len(problem.operations)
    for i, (sum_, result) in enumerate(steps):
        assert re.fullmatch(r"\d+[-+*]\d+", sum_)
        assert eval(sum_) == int(result)  # only digits and one operator, as checked above
        assert 0 <= int(result) <= LARGEST
        if i:
            assert sum_.startswith(steps[i - 1][1] + problem.operations[i])
    assert int(steps[-1][1]) == problem.answer


def test_splits_share_no_scene_sentence_or_calculation():
    assert not set(scenes_of("train")) & set(scenes_of("test"))
    assert {*scenes_of("train"), *scenes_of("test")} == set(range(len(SCENES)))
    assert {p.scene for p in TRAIN} == set(scenes_of("train"))
    assert {p.scene for p in TEST} == set(scenes_of("test"))

    def story(split: str) -> set[str]:
        scenes = [SCENES[i] for i in scenes_of(split)]
        parts = ("start", "groups", "gain", "lose")
        return {text for scene in scenes for part in parts for text in scene[part]}

    assert not story("train") & story("test")
    assert all(split_of(p.operations, p.numbers) == "train" for p in TRAIN)
    assert all(split_of(p.operations, p.numbers) == "test" for p in TEST)


def test_both_lengths_all_operations_and_no_repetition():
    for problems in (TRAIN, TEST):
        lengths = [len(p.operations) for p in problems]
        assert lengths.count(2) == lengths.count(3) == len(problems) // 2
        assert {p.operations[0] for p in problems} == {"+", "-", "*"}
        assert len({p.question for p in problems}) == len(problems)


def test_the_same_seed_gives_the_same_problems_in_any_process():
    code = (
        "from rasa_ext.commands.problems import make_problems\n"
        "print(*(p.question for p in make_problems(20, split='test', seed=1)), sep='\\n')"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.splitlines() == [p.question for p in TEST[:20]]
    assert make_problems(20, split="test", seed=2) != TEST[:20]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"split: expected 'train' or 'test', got 'dev'"):
        make_problems(1, split="dev")
    with pytest.raises(ValueError, match="count: expected 0 or more, got -1"):
        make_problems(-1, split="test")
    assert make_problems(0, split="test") == []
