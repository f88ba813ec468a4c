"""The tasks: training rows, dev rows for choosing a learning rate, and test rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.batches import Row, encoded
from rasa_ext.commands.demo import INSTRUCTION, conversation
from rasa_ext.commands.measuring import exact_match, greedy_answers
from rasa_ext.commands.problems import make_problems
from research.experiments import docstrings
from research.experiments.training import products_in

NAMES = ("maths", "docstrings", "gsm8k")
SEQ_LEN = 320

_GSM8K = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
"""SHA-256 of the two GSM8K files."""
_CALCULATION = re.compile("<<.*?>>")
_DEV_SEED = 1
"""Dev problems have another seed than test problems, but the same scenes."""


@dataclass(frozen=True)
class Task:
    """Encoded rows of three disjoint sets, and questions if answers can be right or wrong."""

    name: str
    train: list[Row]
    dev: list[Row]
    test: list[Row]
    prompts: tuple[str, ...] = ()
    answers: tuple[float, ...] = ()
    new_tokens: int = 32
    """Limit of an answer's tokens; the longest worked solution of "maths" has 27."""
    other: tuple[Row, ...] = ()
    """The task's own rows for measuring forgetting, if it has some."""


def make_task(
    name: str,
    tokenizer: Any,
    *,
    train: int,
    dev: int,
    test: int,
    seq_len: int = SEQ_LEN,
    questions: int | None = None,
    gsm8k: Path | None = None,
) -> Task:
    """Make a task by name, with the given numbers of rows of at most ``seq_len`` tokens.

    "maths": word problems with worked solutions (``rasa_ext.commands.problems``). "docstrings":
    functions of Python's standard library with the first line of their docstrings. "gsm8k": the
    files train.jsonl and test.jsonl in the folder ``gsm8k``. Longer conversations are left out; a
    set is smaller if the task has too few rows. ``questions`` is the number of questions and
    defaults to ``test``.

    Raises ValueError if the name is unknown or the files are not GSM8K's.
    """
    sizes = {"train": train, "dev": dev, "test": test}
    questions = test if questions is None else questions
    if name == "maths":
        return _maths(tokenizer, sizes, questions, seq_len)
    if name == "docstrings":
        rows = {
            split: _encoded(map(_described, docstrings.functions(split)), tokenizer, size, seq_len)
            for split, size in sizes.items()
        }
        return Task(name, **rows)
    if name == "gsm8k":
        return _gsm8k(tokenizer, sizes, questions, seq_len, gsm8k)
    raise ValueError(f"task: expected one of {', '.join(NAMES)}, got {name!r}.")


def other_text(tokenizer: Any, count: int, length: int = 128) -> list[Row]:
    """Return windows of text that no task trains on: the language reference in ``help()``.

    Every token except the first of a window has a loss.
    """
    rows = []
    for key in sorted(topics):
        if len(rows) == count:
            break
        ids = list(tokenizer(topics[key], add_special_tokens=False)["input_ids"])[:length]
        if len(ids) == length:
            rows.append({"input_ids": ids, "labels": ids})
    return rows


def solved(model: Any, tokenizer: Any, task: Task, *, bfloat16: bool = True) -> float | None:
    """Return the share of questions that greedy answers solve, or None if there are no questions.

    An answer is right if it ends in the right number.
    """
    if not task.prompts:
        return None
    model.eval()
    with products_in(bfloat16):
        answers = greedy_answers(model, tokenizer, task.prompts, task.new_tokens, batch_size=64)
    return exact_match(answers, task.answers)


def _maths(tokenizer: Any, sizes: dict[str, int], questions: int, seq_len: int) -> Task:
    test = make_problems(max(sizes["test"], questions), split="test", seed=0)
    asked = {problem.question for problem in test}
    dev = make_problems(2 * sizes["dev"], split="test", seed=_DEV_SEED)
    dev = [problem for problem in dev if problem.question not in asked][: sizes["dev"]]
    drawn = {"train": make_problems(sizes["train"], split="train", seed=0), "dev": dev}
    rows = {
        split: _encoded(map(conversation, problems), tokenizer, sizes[split], seq_len)
        for split, problems in (drawn | {"test": test}).items()
    }
    prompts = tuple(_prompt(conversation(each), tokenizer) for each in test[:questions])
    answers = tuple(problem.answer for problem in test[:questions])
    return Task("maths", **rows, prompts=prompts, answers=answers)


def _gsm8k(
    tokenizer: Any, sizes: dict[str, int], questions: int, seq_len: int, folder: Path | None
) -> Task:
    """Make the task from GSM8K's own split; dev rows are the last of the training set that fit."""
    train, test = (_of_gsm8k(split, folder) for split in ("train", "test"))
    drawn = sizes["train"] + sizes["dev"]
    fitting = _encoded(train, tokenizer, drawn, seq_len)
    if len(fitting) < drawn:
        raise ValueError(
            f"train, dev: expected at most {len(fitting)} rows together, which have at most "
            f"{seq_len} tokens, got {drawn}."
        )
    rows = {
        "train": fitting[: sizes["train"]],
        "dev": _encoded(reversed(train), tokenizer, sizes["dev"], seq_len),
        "test": _encoded(test, tokenizer, sizes["test"], seq_len),
    }
    fit = (each for each in test if _encoded([each], tokenizer, 1, seq_len))
    asked = list(itertools.islice(fit, questions))
    prompts = tuple(_prompt(each, tokenizer) for each in asked)
    answers = tuple(float(each[-1]["content"].split("####")[-1].replace(",", "")) for each in asked)
    return Task("gsm8k", **rows, prompts=prompts, answers=answers, new_tokens=128)


def _of_gsm8k(split: str, folder: Path | None) -> list[list[dict[str, str]]]:
    """Read the conversations of a GSM8K file, without the calculator notes between << and >>."""
    if folder is None:
        raise ValueError("gsm8k: expected the folder with train.jsonl and test.jsonl, got none.")
    path = folder / f"{split}.jsonl"
    found = path.read_bytes()
    if (mark := hashlib.sha256(found).hexdigest()) != _GSM8K[split]:
        raise ValueError(f"gsm8k: expected {path} with SHA-256 {_GSM8K[split]}, got {mark}.")
    return [
        [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": _CALCULATION.sub("", problem["answer"])},
        ]
        for problem in map(json.loads, found.decode().splitlines())
    ]


def _described(function: docstrings.Function) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Say in one line what the function does."},
        {"role": "user", "content": function.code},
        {"role": "assistant", "content": function.summary},
    ]


def _prompt(messages: list[dict[str, str]], tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)


def _encoded(
    conversations: Iterable[list[dict[str, str]]], tokenizer: Any, count: int, seq_len: int
) -> list[Row]:
    """Encode the first ``count`` conversations that fit; the last turn and its end have a loss."""

    def each() -> Iterator[Row]:
        for messages in conversations:
            prompt = _prompt(messages, tokenizer)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            answer = whole.removeprefix(prompt).rstrip()
            # One token above the limit shows which rows are too long.
            row = encoded(prompt, answer, tokenizer, seq_len + 1)
            if len(row["input_ids"]) <= seq_len:
                yield row

    return list(itertools.islice(each(), count))
