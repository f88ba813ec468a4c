"""A mixture of experts made from a dense base: copies of its MLPs (arXiv 2212.05055).

The copies differ by noise and by a short training, so the base is one whose experts have begun to
part. Nothing about the experts is planted.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.batches import Row
from research.experiments import docstrings
from research.experiments.training import Recipe, Run, save

STACKS = ("experts.gate_up_proj", "experts.down_proj")
"""Endings of the names of the experts' weights."""
LONGEST = 128
"""Limit of tokens in a row of the text for the short training."""


@torch.no_grad()
def upcycled(base: Any, blocks: int, experts: int, top: int, noise: float, seed: int = 0) -> Any:
    """Replace the MLP of the last blocks of a Llama by experts, and return the model.

    Args:
        base: the dense model, which is changed.
        blocks: how many of the last blocks get experts.
        experts: number of experts in a block.
        top: number of experts that a token goes through.
        noise: standard deviation of what is added to a copy, over that of the weight.
        seed: of the noise and of the routers.
    """
    torch.manual_seed(seed)
    given = base.config
    config = MixtralConfig(
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        hidden_act=given.hidden_act,
        num_local_experts=experts,
        num_experts_per_tok=top,
    )
    config._experts_implementation = "grouped_mm"
    for layer in base.model.layers[-blocks:]:
        dense, layer.mlp = layer.mlp, MixtralSparseMoeBlock(config).to(base.dtype)
        gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", dense.down_proj.weight)):
            stack = getattr(layer.mlp.experts, name)
            stack.copy_(weight + noise * weight.std() * torch.randn_like(stack))
        nn.init.normal_(layer.mlp.gate.weight, std=0.02)
    return base


def made(
    base: Any,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int,
    lr: float,
    rows: Sequence[Row] | None = None,
    **shape: Any,
) -> Any:
    """Upcycle a base, and train experts and routers on code, or read them from ``folder``.

    Args:
        base: the dense model, which is changed.
        tokenizer: the base's.
        folder: where the trained experts are stored.
        steps: steps of the training, of 8 rows.
        lr: peak rate of the training.
        rows: other rows to train on.
        shape: arguments of ``upcycled``.

    Returns:
        The frozen model.
    """
    model = upcycled(base, **shape).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, MixtralSparseMoeBlock):
            module.requires_grad_(True)
    parts = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mark = zlib.crc32(json.dumps([steps, lr, shape], sort_keys=True).encode())
    path = folder / f"upcycled-{mark:08x}.pt"
    if not path.is_file():
        recipe = Recipe(steps, 8, lr)
        run = Run(model, rows or code_rows(tokenizer), tokenizer.pad_token_id, recipe)
        while run.going:
            run.advance()
        save({name: p.detach() for name, p in parts.items()}, path)
    model.load_state_dict(torch.load(path), strict=False)
    return model.requires_grad_(False).eval()


def code_rows(tokenizer: Any) -> list[Row]:
    """Encode functions of Python's standard library; every token except the first has a loss."""
    rows = []
    for function in docstrings.functions("train"):
        ids = list(tokenizer(function.code, add_special_tokens=False)["input_ids"])[:LONGEST]
        rows.append({"input_ids": ids, "labels": ids})
    return rows
