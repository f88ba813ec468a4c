"""A small model that has learnt facts, and new tasks of known rank for this model.

A fact is a pair of key tokens followed by a value token. Each row starts with a noise token, so
that a fact can be tested in contexts that no training row shows. The seed draws the keys.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.batches import IGNORE, Row
from research.experiments.tasks import Task
from research.experiments.training import Recipe, Run, mean_loss, save

PAD, VALUES, KEYS = 0, 64, 32
"""The padding token; the number of values; the number of first keys, and also of second keys."""
_NOISE = range(1 + VALUES + 2 * KEYS, 17 + VALUES + 2 * KEYS)
TRAIN_NOISE, HELD_OUT_NOISE = _NOISE[:12], _NOISE[12:]
"""Noise tokens before a fact: the base trains with all of them, a new task with the first 12."""
_EACH = 4
"""Number of facts per value."""
WIDTH = 64
BASE_RECIPE = Recipe(steps=1200, batch_size=64, lr=2e-3, bfloat16=False)
BASE_LOSS = 0.01
"""Highest loss in nats on the facts at which the base counts as having learnt them."""
KINDS = ("permute", "values")

Fact = tuple[int, int, int]
"""The tokens of a fact: first key, second key, value."""


def facts(seed: int) -> list[Fact]:
    """Return the facts of a seed's base, with random keys.

    Each run of ``VALUES`` facts has every value once.
    """
    draw = random.Random(f"facts/{seed}")
    first, second = 1 + VALUES, 1 + VALUES + KEYS
    pairs = [(first + a, second + b) for a in range(KEYS) for b in range(KEYS)]
    known = draw.sample(pairs, _EACH * VALUES)
    return [(a, b, 1 + i % VALUES) for i, (a, b) in enumerate(known)]


def rows_of(known: list[Fact], noise: range, count: int, seed: int = 0) -> list[Row]:
    """Return ``count`` rows for each fact, each with a different noise token before the fact."""
    draw = random.Random(f"rows/{seed}")
    return [
        {"input_ids": [each, a, b, value], "labels": [IGNORE, IGNORE, IGNORE, value]}
        for a, b, value in known
        for each in draw.sample(noise, count)
    ]


def make_target(kind: str, rank: int, seed: int) -> Task:
    """Make a new task for the base of a seed.

    "permute": ``rank`` + 1 values change places in one cycle, so the map of values changes by
    exactly this rank, whatever the keys. Half of each moved value's facts are training rows; dev
    and test have the other facts. "values": ``rank`` facts get new values, so a linear memory needs
    a change of at most this rank. All changed facts are training rows; dev and test show them in
    other contexts. Half of the unchanged facts are training rows; the other half is ``other``.

    Raises ValueError if the kind is unknown or the rank is out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
    if not 1 <= rank < VALUES:
        raise ValueError(f"rank: expected 1 to {VALUES - 1}, got {rank}.")
    known = facts(seed)
    draw = random.Random(f"{kind}/{rank}/{seed}")
    if kind == "permute":
        cycle = draw.sample(range(1, 1 + VALUES), rank + 1)
        moved = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        changed = [(a, b, moved[value]) for a, b, value in known if value in moved]
        same = [fact for fact in known if fact[2] not in moved]
        once = len(cycle)  # number of changed facts with each value once
        shown, dev, test = changed[: 2 * once], changed[2 * once : 3 * once], changed[3 * once :]
    else:
        others = [draw.choice(range(1, VALUES)) for _ in range(rank)]  # offset to another value
        changed = [
            (a, b, 1 + (value - 1 + other) % VALUES)
            for (a, b, value), other in zip(known, others, strict=False)
        ]
        same = known[rank:]
        shown = dev = test = changed
    half = len(same) // 2
    return Task(
        kind,
        rows_of(shown, TRAIN_NOISE, 4, seed) + rows_of(same[:half], TRAIN_NOISE, 1, seed),
        rows_of(dev, HELD_OUT_NOISE[:2], 2, seed),
        rows_of(test, HELD_OUT_NOISE[2:], 2, seed),
        other=tuple(rows_of(same[half:], HELD_OUT_NOISE, 1, seed)),
    )


def make_base(depth: int, seed: int, folder: Path) -> Any:
    """Return a Llama of ``depth`` layers that has learnt the facts of a seed.

    The model is read from ``folder`` if it is there, else trained and saved. Raises ValueError if
    the model has not learnt the facts, because the new tasks assume that it has.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_NOISE.stop,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD,
        )
    )
    path = folder / f"depth{depth}-seed{seed}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path))
        return model.requires_grad_(False)
    rows = rows_of(facts(seed), _NOISE, len(_NOISE))
    run = Run(model, rows, PAD, BASE_RECIPE)
    while run.going:
        run.advance()
    loss = mean_loss(model, rows_of(facts(seed), _NOISE, 4), PAD, bfloat16=False)
    if loss > BASE_LOSS:
        raise ValueError(f"base: expected a loss of at most {BASE_LOSS} on the facts, got {loss}.")
    save(model.state_dict(), path)
    return model.requires_grad_(False)
