"""Hashes that lead to one another: one table, asked for in one leap or step by step.

Two kinds of tasks after "Planning vs Reasoning" (arXiv 2412.00029), which compares what adapters
learn on HashHop (planning) and on HashChain (reasoning). The exact form of its data is not public;
the definitions here are this package's own:

- A table has ``pairs`` lines ``a=b`` in random order. They are one circle: every hash stands once
  on the left and once on the right, so that only following it leads to the answer.
- The prompt is the table, a hash to start from, and how many steps to go.
- `hash_hop`: the completion is the hash at the end, with nothing written on the way.
- `hash_chain`: the completion is every step of the way, each as it stands in the table.

For the same arguments both have the same prompts, but for the line that says what is asked, so two
adapters that are trained on them differ by what has to be written alone.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable

LETTERS = 4
"""Of a hash: there are 26**4 of them."""

HOP_QUESTION = "Only the hash at the end:"
CHAIN_QUESTION = "Every step:"


def hash_hop(count: int, hops: int, seed: int = 0, pairs: int = 8) -> list[dict[str, str]]:
    """Make records that ask for the hash ``hops`` steps on, at once.

    Args:
        count: how many.
        hops: steps from the start to the answer.
        seed: other seeds give other tables.
        pairs: lines of a table, more than ``hops``.

    Returns:
        Objects of "prompt" and "completion", as `write_examples` writes and `finetune` reads them;
        the same for the same arguments.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return _records(count, hops, seed, pairs, HOP_QUESTION, lambda way: f" {way[-1]}")


def hash_chain(count: int, hops: int, seed: int = 0, pairs: int = 8) -> list[dict[str, str]]:
    """Make records that ask for all the ``hops`` steps, one after the other.

    The arguments, the result and the errors are those of `hash_hop`.
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
    if pairs <= hops:  # the way would come back to where it began
        raise ValueError(f"pairs: expected more than the {hops} hops, got {pairs}.")
    rng = random.Random(f"{hops}/{pairs}/{seed}")  # strings give the same in every process
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
    """Hashes that differ from one another, in random order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    return list(found)
