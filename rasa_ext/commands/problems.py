"""Arithmetic word problems from a seed: a task that a small model can learn in minutes.

In a problem's scene (fruit in a basket, riders on a bus, ...) a count starts at some number and
changes two or three times. Training and held-out problems share no scene, so no sentence, and no
tuple (operations, numbers), so no calculation. A model can therefore not solve held-out problems
from memory.

`split_of` assigns the calculations to the splits. It is a pure function, so tests can check this.
"""

from __future__ import annotations

import operator
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

Split = Literal["train", "test"]

_APPLY = {"*": operator.mul, "+": operator.add, "-": operator.sub}
LARGEST = 40  # counts in a problem, and so the answers, are in 0..LARGEST


# Sentences by scene; `{n}` is a number, `{g}` a number of groups.
_TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SCENES: list[dict[str, list[str]]] = [*_TEXTS["train"], *_TEXTS["test"]]


@dataclass(frozen=True)
class Problem:
    """One word problem.

    `operations` are, for example, ("+", "-"). `numbers` are the first count and one number per
    operation. "*" can only be the first operation; its numbers are the size of a group and the
    number of groups.
    """

    question: str
    answer: int
    operations: tuple[str, ...]
    numbers: tuple[int, ...]
    scene: int

    @property
    def working(self) -> str:
        """The steps as equations, such as `5+4=9, 9-2=7`."""
        counts = _counts(self.operations, self.numbers)
        steps = zip(counts, self.operations, self.numbers[1:], counts[1:], strict=False)
        return ", ".join(f"{before}{sign}{n}={after}" for before, sign, n, after in steps)


def make_problems(count: int, *, split: Split, seed: int = 0) -> list[Problem]:
    """Make `count` different problems of one split. The arguments determine the result.

    Half have two steps and half three. Raises ValueError for an unknown split or a negative count.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if count < 0:
        raise ValueError(f"count: expected 0 or more, got {count}")
    # zlib.crc32, not hash(): strings hash differently in every process.
    rng = random.Random(zlib.crc32(f"{split}/{seed}".encode()))
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        problem = _draw(rng, split, steps=2 + len(problems) % 2)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def split_of(operations: tuple[str, ...], numbers: tuple[int, ...]) -> Split:
    """Return the split of a calculation; one in five is held out."""
    key = " ".join([*operations, *map(str, numbers)])
    return "test" if zlib.crc32(key.encode()) % 5 == 0 else "train"


def scenes_of(split: Split) -> range:
    """Return the indices in `SCENES` of one split's scenes."""
    first = len(_TEXTS["train"])
    return range(first) if split == "train" else range(first, len(SCENES))


def _draw(rng: random.Random, split: Split, steps: int) -> Problem:
    while True:
        operations, numbers = _draw_calculation(rng, steps)
        if split_of(operations, numbers) == split:
            break
    index = rng.choice(scenes_of(split))
    question = _write_text(rng, SCENES[index], operations, numbers)
    return Problem(question, _counts(operations, numbers)[-1], operations, numbers, index)


def _draw_calculation(rng: random.Random, steps: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Draw operations and numbers with all counts in 0..LARGEST."""
    while True:
        first = rng.choice("*+-")
        operations = (first, *(rng.choice("+-") for _ in range(steps - 1)))
        if first == "*":
            numbers = [rng.randint(2, 6), rng.randint(2, 5)]
        else:
            numbers = [rng.randint(3, 15), rng.randint(2, 9)]
        numbers += [rng.randint(2, 9) for _ in range(steps - 1)]
        if all(0 <= count <= LARGEST for count in _counts(operations, numbers)[1:]):
            return operations, tuple(numbers)


def _counts(operations: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """Return the count at the start and after each operation."""
    counts = [numbers[0]]
    for operation, number in zip(operations, numbers[1:], strict=True):
        counts.append(_APPLY[operation](counts[-1], number))
    return counts


def _write_text(
    rng: random.Random,
    scene: dict[str, list[str]],
    operations: tuple[str, ...],
    numbers: tuple[int, ...],
) -> str:
    name = rng.choice(_TEXTS["names"])
    friend = rng.choice([other for other in _TEXTS["names"] if other != name])
    if operations[0] == "*":
        sentences = [rng.choice(scene["groups"]).format(n=numbers[0], g=numbers[1], name=name)]
        events = list(zip(operations[1:], numbers[2:], strict=True))
    else:
        sentences = [rng.choice(scene["start"]).format(n=numbers[0], name=name)]
        events = list(zip(operations, numbers[1:], strict=True))
    for operation, number in events:
        phrases = scene["gain"] if operation == "+" else scene["lose"]
        sentences.append(rng.choice(phrases).format(n=number, name=name, friend=friend))
    sentences.append(rng.choice(scene["ask"]).format(name=name))
    return " ".join(sentences)
