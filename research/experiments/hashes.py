"""Tasks over a table of linked hashes: write only the last hash, or write every step.

The two tasks follow "Planning vs Reasoning" (arXiv 2412.00029), which compares what adapters learn
on HashHop (planning) and on HashChain (reasoning). The paper's data format is not public, so the
definitions here are our own:

- A table has ``pairs`` lines ``a=b`` in random order. The lines form one circle: every hash is once
  on the left and once on the right, so only following the lines leads to the answer.
- The prompt is the table, a start hash, and the number of steps.
- `hash_hop`: the completion is the last hash only.
- `hash_chain`: the completion is every step, each written like its line of the table.

With equal arguments the two tasks have the same prompts except for the question, so two adapters
trained on them differ only in what they have to write.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable

LETTERS = 4
"""Letters of a hash, so there are 26**4 hashes."""

HOP_QUESTION = "Only the hash at the end:"
CHAIN_QUESTION = "Every step:"


def hash_hop(count: int, hops: int, seed: int = 0, pairs: int = 8) -> list[dict[str, str]]:
    """Make records that ask only for the last hash after ``hops`` steps.

    Args:
        count: number of records.
        hops: steps from the start to the answer.
        seed: seed of the random tables.
        pairs: lines of a table, more than ``hops``.

    Returns:
        Objects with "prompt" and "completion", in the format that `write_examples` writes and
        `finetune` reads. Equal arguments give equal records.

    Raises:
        ValueError: an argument is out of range; the message names it and what was expected.
    """
    return _records(count, hops, seed, pairs, HOP_QUESTION, lambda way: f" {way[-1]}")


def hash_chain(count: int, hops: int, seed: int = 0, pairs: int = 8) -> list[dict[str, str]]:
    """Make records that ask for all ``hops`` steps in order.

    Arguments, result and errors are like those of `hash_hop`.
    """
    return _records(count, hops, seed, pairs, CHAIN_QUESTION, _steps)


def _steps(way: list[str]) -> str:
    return "".join(f" {a}={b}" for a, b in itertools.pairwise(way))


def _records(
    count: int,
    hops: int,
    seed: int,
    pairs: int,
    question: str,
    answer: Callable[[list[str]], str],
) -> list[dict[str, str]]:
    if count < 0:
        raise ValueError(f"count: expected 0 or more, got {count}.")
    if hops < 1:
        raise ValueError(f"hops: expected at least 1, got {hops}.")
    if pairs <= hops:  # the steps would return to the start
        raise ValueError(f"pairs: expected more than the {hops} hops, got {pairs}.")
    rng = random.Random(f"{hops}/{pairs}/{seed}")  # a string seeds the same in every process
    found = []
    for _ in range(count):
        circle = _different(rng, pairs)
        lines = [f"{a}={b}" for a, b in zip(circle, circle[1:] + circle[:1], strict=True)]
        way = circle[: hops + 1]
        rng.shuffle(lines)
        table = "\n".join(lines)
        prompt = f"{table}\nStart at {way[0]} and go {hops} steps. {question}"
        found.append({"prompt": prompt, "completion": answer(way)})
    return found


def _different(rng: random.Random, count: int) -> list[str]:
    """Draw ``count`` distinct hashes in random order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    return list(found)
