"""Shared parts of the experiments: tables, training and tasks, on a tiny model."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from benchmarks.batches import collate, encoded
from research.experiments import docstrings, tasks
from research.experiments.table import Table
from research.experiments.tasks import make_task, other_text
from research.experiments.training import Recipe, Run, batches, mean_loss, trained_losses
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums

PAD = 0


@pytest.fixture(scope="module")
def rows():
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token
    return [encoded(p["prompt"], p["completion"] + end, tokenizer, 64) for p in sums(12)]


@pytest.fixture
def library(tmp_path):
    """A small standard library: modules of every split, a test, and a file that does not parse."""
    folder = tmp_path / "library"
    folder.mkdir()
    for name in map("module{}".format, range(30)):
        lines = [
            f"def {name}_{i}(x):\n    '''{name} does thing {i} to x.'''\n    return x + {i}\n"
            for i in range(3)
        ]
        (folder / f"{name}.py").write_text("\n".join([*lines, "def bare(x):\n    return x\n"]))
    (folder / "test").mkdir()
    (folder / "test" / "module.py").write_text(
        "def f():\n    '''A test that is not taken.'''\n    g()\n"
    )
    (folder / "broken.py").write_text("def f(:\n")
    return folder


# Tables


def test_rows_come_back_and_other_columns_are_refused(tmp_path):
    path = tmp_path / "folder" / "t.csv"
    Table(path, ["a", "b"]).append([{"a": 1, "b": "x,\ny"}, {"a": 2}])
    Table(path, ["a", "b"]).append([{"a": 3, "b": 0.5}])
    assert Table(path, ["a", "b"]).rows() == [
        {"a": "1", "b": "x,\ny"},
        {"a": "2", "b": ""},
        {"a": "3", "b": "0.5"},
    ]
    with pytest.raises(ValueError, match=r"expected the columns a, c, got a, b"):
        Table(path, ["a", "c"])
    with pytest.raises(ValueError, match="dict contains fields"):
        Table(path, ["a", "b"]).append([{"a": 4}, {"z": 1}])
    assert len(Table(path, ["a", "b"]).rows()) == 3  # the failed run added no row


# Training


def test_losses_are_those_of_the_whole_model(rows):
    model, batch = make_model(), collate(rows[:5], PAD)
    losses = trained_losses(model, batch)
    assert losses.shape[0] == sum(label != -100 for row in rows[:5] for label in row["labels"][1:])
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
    each = torch.cat([trained_losses(model, collate([row], PAD)) for row in rows])
    found = mean_loss(model, rows, PAD, bfloat16=False, batch_size=5)
    assert found == pytest.approx(each.mean().item(), rel=1e-5)


def test_the_rate_rises_and_falls():
    recipe = Recipe(steps=20, batch_size=1, lr=2.0)
    rates = [recipe.rate(step) for step in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 / 18)


def test_every_row_is_met_once_a_pass():
    order = batches(6, 4, 6, seed=1)
    flat = [i for step in order for i in step]
    assert [len(step) for step in order] == [4] * 6
    assert all(sorted(flat[i : i + 6]) == list(range(6)) for i in range(0, 24, 6))
    assert order != batches(6, 4, 6, seed=2)


def test_a_run_goes_on_as_if_it_had_not_been_cut(rows):
    recipe = Recipe(steps=6, batch_size=4, lr=1e-2, bfloat16=False)
    whole, first, second = (Run(make_model(), rows, PAD, recipe) for _ in range(3))
    while whole.going:
        whole.advance()
    for _ in range(3):
        first.advance()
    second.load_state_dict(first.state_dict())
    while second.going:
        second.advance()
    assert second.losses == whole.losses
    assert whole.losses[-1] < whole.losses[0] - 0.5
    with pytest.raises(ValueError, match="expected one with Recipe"):
        Run(make_model(), rows, PAD, Recipe(7, 4, 1e-2)).load_state_dict(first.state_dict())


def test_a_loss_that_is_no_number_ends_a_run(rows):
    run = Run(make_model(), rows, PAD, Recipe(50, 4, 1e30, bfloat16=False))
    while run.going:
        run.advance()
    assert run.diverged
    assert run.step < 50


# Tasks


def test_maths_rows_share_no_question_and_their_answers_are_the_last_numbers():
    tokenizer = make_tokenizer()
    task = make_task("maths", tokenizer, train=8, dev=6, test=8)
    texts = {
        split: {tokenizer.decode(row["input_ids"]) for row in getattr(task, split)}
        for split in ("train", "dev", "test")
    }
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    assert (len(texts["train"]), len(texts["dev"]), len(texts["test"])) == (8, 6, 8)
    for prompt, answer, row in zip(task.prompts, task.answers, task.test, strict=True):
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith(prompt)
        assert f"={answer}<|im_end|>" in text
    with pytest.raises(ValueError, match="task: expected one of maths, docstrings, gsm8k, got"):
        make_task("chess", tokenizer, train=1, dev=1, test=1)


def test_gsm8k_is_its_own_files_and_rows_fit(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    marks = {}
    for split, answers in (("train", range(20, 32)), ("test", (1000, 7, 8))):
        problems = [
            {"question": f"{split} {n}? ", "answer": f"<<{n}+0={n}>>so {n}\n#### {n:,}"}
            for n in answers
        ]
        problems.insert(1, {"question": "long " * 90, "answer": "1\n#### 1"})
        text = "\n".join(map(json.dumps, problems)).encode()
        (tmp_path / f"{split}.jsonl").write_bytes(text)
        marks[split] = hashlib.sha256(text).hexdigest()
    sizes = {"train": 4, "dev": 2, "test": 3, "questions": 2, "seq_len": 200}
    with pytest.raises(
        ValueError,
        match=f"gsm8k: expected .*train.jsonl with SHA-256 17f347.*, got {marks['train']}",
    ):
        make_task("gsm8k", tokenizer, **sizes, gsm8k=tmp_path)
    with pytest.raises(
        ValueError, match=r"gsm8k: expected the folder with train.jsonl and test.jsonl"
    ):
        make_task("gsm8k", tokenizer, **sizes)
    monkeypatch.setattr(tasks, "_GSM8K", marks)
    with pytest.raises(ValueError, match=r"train, dev: expected at most 12 rows .* got 13"):
        make_task("gsm8k", tokenizer, **sizes | {"train": 11}, gsm8k=tmp_path)
    task = make_task("gsm8k", tokenizer, **sizes, gsm8k=tmp_path)
    texts = [[tokenizer.decode(r["input_ids"]) for r in rows] for rows in (task.train, task.dev)]
    assert ["train 2" in text for text in texts[0]] == [True] * 4
    assert ["train 31?" in texts[1][0], "train 30?" in texts[1][1]] == [True, True]
    learnt = [label for label in task.train[0]["labels"] if label != -100]
    assert tokenizer.decode(learnt) == "so 20\n#### 20<|im_end|>"
    assert len(task.test) == 3
    assert task.answers == (1000.0, 7.0)
    assert task.prompts[0].endswith("test 1000? <|im_end|>\n<|im_start|>assistant\n")


def test_docstrings_are_split_by_module_and_leave_the_code(library):
    found = {split: docstrings.functions(split, library) for split in ("train", "dev", "test")}
    modules = [{f.module for f in found[split]} for split in found]
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]
    assert set.union(*modules) == {f"module{i}" for i in range(30)}
    assert sum(map(len, found.values())) == 90
    one = found["train"][0]
    assert one.code.startswith(f"def {one.module}_")
    assert one.summary.startswith(f"{one.module} does thing ")
    assert "does thing" not in one.code


def test_a_task_of_docstrings_and_the_other_text(library, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(library))
    tokenizer = make_tokenizer()
    task = make_task("docstrings", tokenizer, train=10, dev=2, test=3)
    assert (len(task.train), len(task.dev), len(task.test)) == (10, 2, 3)
    assert task.prompts == ()
    learnt = [label for label in task.train[0]["labels"] if label != -100]
    assert "does thing" in tokenizer.decode(learnt)
    assert "return" not in tokenizer.decode(learnt)
    windows = other_text(tokenizer, 3, length=40)
    assert [len(row["input_ids"]) for row in windows] == [40] * 3
    assert windows[0]["labels"] == windows[0]["input_ids"]
