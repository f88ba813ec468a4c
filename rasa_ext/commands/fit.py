"""What a run needs of memory, by the sum of docs/memory.md, and what the machine has."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from rasa_ext import summary
from rasa_ext.commands.options import Options

_BITS = {"load_in_8bit": 1.0, "load_in_4bit": 0.5 + 4 / 64}
"""Bytes per weight of a quantized linear layer: nf4 has a float32 scale for every 64 weights."""


def memory(model: Any, options: Options) -> dict[str, float]:
    """Return the bytes of a run's parts, computed from shapes.

    Args:
        model: the base with the adapter, which may be on the meta device.
        options: the run's.
    """
    base, arguments, report = options.base, options.training, summary(model)
    stored = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = getattr(torch, stored if base.dtype == "auto" else base.dtype)
    size = 4 if str(base.model_name_or_path).endswith(".gguf") else dtype.itemsize
    bits = next((value for name, value in _BITS.items() if getattr(base, name)), size)
    linears = sum(row.L * max(row.experts, 1) * row.shape[0] * row.shape[1] for row in report)
    rest = report.total - report.adapter - linears
    length = getattr(arguments, "max_length", None) or 1024
    tokens = arguments.per_device_train_batch_size * length
    blocks, config = model.config.num_hidden_layers, model.config
    widths = [(row.shape, _padded(row.R), row.L) for row in report]
    packs = sum(R * (shape[0] + shape[1]) * L * (size + 4) for shape, R, L in widths)
    # A block saves two norms' inputs in float32, q, k, v and attention's output, and the gated
    # MLP's gate, SiLU, up and product; every adapted layer saves x Ap^T.
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * width * (heads + (getattr(config, "num_key_value_heads", None) or heads))
    saved = 2 * (4 + size) * config.hidden_size + size * (attention + 4 * config.intermediate_size)
    saved += size * sum(R * L for _, R, L in widths) / blocks
    kept = blocks * saved
    if arguments.gradient_checkpointing:
        kept = size * config.hidden_size * blocks + saved
    return {
        "base": bits * linears + size * rest,
        "adapter": 16.0 * report.trainable,
        "packs": packs,
        "activations": tokens * kept,
        "logits": 12.0 * tokens * config.vocab_size,
    }


def _padded(rank: int) -> int:
    return -(-rank // 16) * 16


def available() -> tuple[float, str]:
    """Return the bytes that are free for a run, and where."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]), f"free on {torch.cuda.get_device_name()}"
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), "in this machine"


def described(model: nn.Module, options: Options) -> str:
    """Return one line about a run's memory: the sum, the parts, and what the machine has."""
    parts = memory(model, options)
    total, (free, where) = sum(parts.values()), available()
    verdict = "it fits" if total < 0.9 * free else "it does not fit"
    listed = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
    return f"memory: about {total / 1e9:.1f} GB ({listed}); {free / 1e9:.1f} GB {where}: {verdict}."
