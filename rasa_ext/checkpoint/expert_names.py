"""Names that checkpoints give the weights of single experts, which a model stacks."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from rasa_ext.base_layers.experts import (
    expert_shape,
    expert_weight_names,
    has_gate,
    is_experts,
    mark,
)

_STACKED = frozenset(
    {"gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid", "gemma4_text", "aria_text"}
    | {"qwen3_vl_moe_text"}
)
"""Model types whose checkpoints also store all experts of a layer in one tensor."""

_PLAIN = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = ("w1", "w3", "w2")
_FAMILIES = {
    # By model_type: (path part in a model, path part in a checkpoint, names).
    "mixtral": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "minimax": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "minimax_m2": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "phimoe": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "lfm2_moe": ("", "", _NUMBERED),
    "deepseek_v4": (".mlp.", ".ffn.", _NUMBERED),
    "kimi_linear": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "mistral_large4_text": (".mlp.", ".", _NUMBERED),
}
"""Families of transformers 5 whose checkpoints use other names than their models. They are the
names of transformers 4, as servers and llama.cpp use them. A test compares with transformers."""


@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """A stacked weight of a model, and the matrices of single experts in it.

    Example:
        >>> rasa_ext.checkpoint.stacked_weights(moe_model)[0].shape  # (experts, out, in)
        (4, 48, 16)
    """

    name: str
    """Name of the weight in the model."""
    path: str
    """Path of the experts in checkpoints."""
    shape: tuple[int, int, int]
    """(experts, out, in)"""
    parts: dict[str, slice]
    """Names of an expert's matrices in checkpoints, and their rows of the weight."""


def stacked_weights(model: nn.Module) -> list[StackedWeight]:
    """List the stacked weights of a model's experts, with the names in checkpoints.

    Args:
        model: a model, patched or not.

    Returns:
        The weights, in the model's order.

    Example:
        >>> weight = rasa_ext.checkpoint.stacked_weights(moe_model)[0]
        >>> weight.name, weight.path
        ('model.layers.0.mlp.experts.gate_up_proj', 'model.layers.0.block_sparse_moe.experts')
        >>> list(weight.parts)
        ['w1', 'w3']
    """
    return [
        StackedWeight(
            f"{path.removesuffix('.base_layer')}.{name}",
            path_in_checkpoint(path.removesuffix(".base_layer"), module),
            expert_shape(module, name),
            parts_of(module, name),
        )
        for path, module in model.named_modules()
        if is_experts(module)
        for name in expert_weight_names(module)
    ]


def path_in_checkpoint(path: str, experts: Any) -> str:
    """Return the path of an experts module in checkpoints."""
    old, new, _ = _family(experts)
    head, middle, tail = path.rpartition(old) if old else (path, "", "")
    return f"{head}{new}{tail}" if middle else path


def parts_of(experts: Any, stack: str) -> dict[str, slice]:
    """Return the names of an expert's matrices in one stacked weight, with their rows.

    They are gate and up, up, or down. Rows are of the weight viewed as (out, in).
    """
    gate, up, down = _family(experts)[2]
    if stack == "down_proj" or not has_gate(experts):
        return {down if stack == "down_proj" else up: slice(None)}
    if not is_concatenated(experts):
        return {gate: slice(0, None, 2), up: slice(1, None, 2)}
    half = expert_shape(experts, stack)[1] // 2
    return {gate: slice(0, half), up: slice(half, None)}


def is_stacked(experts: Any) -> bool:
    """Return whether the family's checkpoints have no names for single experts."""
    unmarked = not hasattr(experts, "is_concatenated")
    return unmarked or not is_concatenated(experts) or _kind(experts) in _STACKED


def is_concatenated(experts: Any) -> bool:
    """Return whether gate's rows precede up's; otherwise they alternate."""
    return mark(experts, "is_concatenated", default=True)


def _family(experts: Any) -> tuple[str, str, tuple[str, str, str]]:
    return _FAMILIES.get(_kind(experts), ("", "", _PLAIN))


def _kind(experts: Any) -> str:
    return str(getattr(getattr(experts, "config", None), "model_type", ""))
