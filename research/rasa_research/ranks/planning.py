"""Rank planning for a model's blocks from a data set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rasa_ext.commands.data import questions, read_examples
from rasa_ext.commands.models import load_model, load_tokenizer
from rasa_ext.commands.output import working
from rasa_ext.commands.parsing import parse_targets
from rasa_research.ranks.hidden_states import POOLINGS, Pooling
from rasa_research.ranks.intrinsic import (
    block_ranks,
    find_blocks,
    hidden_dimensions,
    rank_pattern,
)


@dataclass(frozen=True)
class RankOptions:
    """Options of rank planning: model, data, and settings of the measurement."""

    model: str
    """A name or path for `load_model`."""
    data: str
    """A source for `read_examples`."""
    pooling: Pooling = "mean"
    points: int = 2000
    """Number of examples to use, drawn at random if there are more."""
    seed: int = 0
    """Seed of that draw."""
    k: int = 1
    """The least rank; for RaSA the config's k."""
    blocks: str | None = None
    """Name of the list of blocks; None uses `find_blocks`."""
    target_modules: str = "all-linear"
    template: bool = True
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    seq_len: int = 1024
    batch_size: int = 8
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the options that need neither the model nor the data."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {self.pooling!r}.")
        for name, least in (("points", 3), ("k", 1), ("seq_len", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}.")


@dataclass(frozen=True)
class RankPlan:
    """Measured dimensions, and the ranks computed from them."""

    blocks: list[str]
    dimensions: list[float]
    """Dimensions of each block's input states, then of the last block's output states."""
    ranks: list[int]
    rank_pattern: dict[str, int]
    """Ranks by full layer name."""
    points: int
    """Number of examples measured."""


def plan_ranks(options: RankOptions) -> RankPlan:
    """Run a model over some data and plan the blocks' ranks with `rasa_research.ranks`.

    An example's text is the prompt and the completion, as in `finetune`, without the end token.

    Raises ValueError, naming the option or the line of data.
    """
    examples = read_examples(options.data, options.prompt_field, options.completion_field)
    if len(examples) > options.points:
        examples = random.Random(options.seed).sample(examples, options.points)
    tokenizer = load_tokenizer(options.model)
    with working(f"Loading {options.model}"):
        model = load_model(options.model, options.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = _blocks(model, options.blocks)
    batches = _batches(examples, tokenizer, model.device, options)
    with working(f"Running {len(examples):,} examples"):
        dimensions = hidden_dimensions(
            model, batches, blocks.values(), options.pooling, options.points
        )
    ranks = block_ranks(dimensions, options.k)
    targets = parse_targets(options.target_modules)
    pattern = rank_pattern(model, ranks, blocks.values(), targets)
    return RankPlan(list(blocks), dimensions, ranks, pattern, len(examples))


def _blocks(model: nn.Module, name: str | None) -> dict[str, nn.Module]:
    if name is None:
        return find_blocks(model)
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        kind = "not a module" if found is None else f"a {type(found).__name__}"
        raise ValueError(
            "blocks: expected the name of a ModuleList, such as model.layers, got "
            f"{name!r}: {kind}."
        )
    return {f"{name}.{i}": block for i, block in enumerate(found)}


def _batches(
    examples: Sequence[dict[str, Any]], tokenizer: Any, device: torch.device, options: RankOptions
) -> list[dict[str, torch.Tensor]]:
    """Return batches of texts sorted by length, so that there is little padding."""
    asked = questions(examples, tokenizer, options.template)
    texts = sorted((prompt + answer for prompt, answer in asked), key=len)
    templated = bool(options.template and tokenizer.chat_template)
    found = []
    for start in range(0, len(texts), options.batch_size):
        batch = tokenizer(
            texts[start : start + options.batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=options.seq_len,
            add_special_tokens=not templated,
        ).to(device)
        found.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return found
