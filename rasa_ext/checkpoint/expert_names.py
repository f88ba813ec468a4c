"""What checkpoints call the weights of single experts, which a model stacks."""

from __future__ import annotations

from typing import Any

from rasa_ext.base_layers.experts import bank_shape, has_gate

_PLAIN = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = ("w1", "w3", "w2")
_FAMILIES = {
    # By model_type: (the part of a path in a model, the same in a checkpoint, names).
    "mixtral": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "minimax": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "minimax_m2": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "phimoe": (".mlp.", ".block_sparse_moe.", _NUMBERED),
    "lfm2_moe": ("", "", _NUMBERED),
}
"""The families of transformers 5 whose checkpoints have other names than their models: those of
transformers 4, which servers and llama.cpp keep. A test compares them with transformers' own."""


def path_in_checkpoint(path: str, experts: Any) -> str:
    """Give the path of an experts' module as checkpoints have it."""
    old, new, _ = _family(experts)
    head, found, tail = path.rpartition(old) if old else (path, "", "")
    return f"{head}{new}{tail}" if found else path


def names_in_checkpoint(experts: Any, bank: str) -> tuple[str, ...]:
    """Name the matrices that an expert has in one stacked weight: gate and up, up, or down."""
    gate, up, down = _family(experts)[2]
    if bank == "down_proj":
        return (down,)
    return (gate, up) if has_gate(experts) else (up,)


def rows_of(experts: Any, bank: str) -> tuple[slice, ...]:
    """Tell which rows of a stacked weight, seen as (out, in), each of those matrices has."""
    if bank == "down_proj" or not has_gate(experts):
        return (slice(None),)
    if not is_concatenated(experts):
        return slice(0, None, 2), slice(1, None, 2)
    half = bank_shape(experts, bank)[1] // 2
    return slice(0, half), slice(half, None)


def is_concatenated(experts: Any) -> bool:
    """Tell whether gate's rows stand before up's; otherwise they take turns."""
    return bool(getattr(experts, "is_concatenated", True))


def _family(experts: Any) -> tuple[str, str, tuple[str, str, str]]:
    kind = getattr(getattr(experts, "config", None), "model_type", None)
    return _FAMILIES.get(str(kind), ("", "", _PLAIN))
