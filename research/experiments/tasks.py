"""The tasks: rows to train on, rows to choose a learning rate by, rows to judge by."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from benchmarks.batches import IGNORE, Row, encoded
from rasa_ext.commands.demo import conversation
from rasa_ext.commands.measuring import exact_match, greedy_answers
from rasa_ext.commands.problems import make_problems
from research.experiments import docstrings
from research.experiments.training import products_in

NAMES = ("maths", "docstrings")

_SEQ_LEN = 320
_NEW_TOKENS = 32
"""The longest worked solution has 27 tokens."""
_DEV_SEED = 1
"""Problems to choose a rate by are of another seed than those to judge by, in the same scenes."""


@dataclass(frozen=True)
class Task:
    """Encoded rows of three disjoint sets and, where answers can be right or wrong, questions."""

    name: str
    train: list[Row]
    dev: list[Row]
    test: list[Row]
    prompts: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()


def make_task(name: str, tokenizer: Any, *, train: int, dev: int, test: int) -> Task:
    """A task by name with so many rows (fewer where the library has no more).

    "maths": word problems with worked solutions (``rasa_ext.commands.problems``). "docstrings":
    functions of Python's standard library with the first line of their docstrings.

    Raises ValueError for an unknown name.
    """
    sizes = {"train": train, "dev": dev, "test": test}
    if name == "maths":
        return _maths(tokenizer, sizes)
    if name == "docstrings":
        rows = {
            split: _encoded([_described(f) for f in docstrings.functions(split)[:size]], tokenizer)
            for split, size in sizes.items()
        }
        return Task(name, **rows)
    raise ValueError(f"task: expected one of {', '.join(NAMES)}, got {name!r}.")


def other_text(tokenizer: Any, count: int, length: int = 128) -> list[Row]:
    """Windows of text that no task trains on: the language reference that ``help()`` shows.

    Every token but a window's first carries a loss.
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
    """The share of questions whose greedy answer ends in the right number; None without any."""
    if not task.prompts:
        return None
    model.eval()
    with products_in(bfloat16):
        answers = greedy_answers(model, tokenizer, task.prompts, _NEW_TOKENS, batch_size=64)
    return exact_match(answers, task.answers)


def _maths(tokenizer: Any, sizes: dict[str, int]) -> Task:
    test = make_problems(sizes["test"], split="test", seed=0)
    asked = {problem.question for problem in test}
    dev = make_problems(2 * sizes["dev"], split="test", seed=_DEV_SEED)
    dev = [problem for problem in dev if problem.question not in asked][: sizes["dev"]]
    drawn = {"train": make_problems(sizes["train"], split="train", seed=0), "dev": dev}
    rows = {
        split: _encoded([conversation(p) for p in problems], tokenizer)
        for split, problems in (drawn | {"test": test}).items()
    }
    prompts = (
        tokenizer.apply_chat_template(
            conversation(problem)[:-1], tokenize=False, add_generation_prompt=True
        )
        for problem in test
    )
    return Task("maths", **rows, prompts=tuple(prompts), answers=tuple(p.answer for p in test))


def _described(function: docstrings.Function) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Say in one line what the function does."},
        {"role": "user", "content": function.code},
        {"role": "assistant", "content": function.summary},
    ]


def _encoded(conversations: Sequence[list[dict[str, str]]], tokenizer: Any) -> list[Row]:
    """The rows of conversations that fit; the last turn is learnt, with its closing token."""
    rows = []
    for messages in conversations:
        template = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        prompt = template(messages[:-1], add_generation_prompt=True)
        answer = template(messages).removeprefix(prompt).rstrip()
        row = encoded(prompt, answer, tokenizer, _SEQ_LEN)
        if any(label != IGNORE for label in row["labels"]):
            rows.append(row)
    return rows
