"""Stacked experts: modules that hold the weights of all their experts in 3-D parameters.

transformers marks such a module with attributes (its ``use_experts_implementation``) that say how
the weights lie. They are all that is asked for here, whatever the module's class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.sharded import is_dtensor

Bank = tuple[nn.Module, str]
"""One stacked weight: the module, and the name of its parameter."""

_MARKS = ("has_bias", "is_transposed", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds stacked experts and says how they lie."""
    return all(hasattr(module, mark) for mark in _MARKS) and all(
        isinstance(getattr(module, name, None), Tensor) for name in bank_names(module)
    )


def bank_names(module: Any) -> tuple[str, str]:
    """Name the stacked weights of experts: the one on their input, the one on their output."""
    return ("gate_up_proj" if has_gate(module) else "up_proj"), "down_proj"


def has_gate(module: Any) -> bool:
    """Tell whether experts multiply by a gate; older releases of transformers knew no others."""
    return bool(getattr(module, "has_gate", True))


def has_post_expert_norm(module: Any) -> bool:
    """Tell whether a norm follows each expert; older releases of transformers knew none."""
    return bool(getattr(module, "has_post_expert_norm", False))


def bank_shape(module: Any, name: str) -> tuple[int, int, int]:
    """Give (experts, out, in) of a stacked weight, however it lies."""
    experts, rows, columns = getattr(module, name).shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


def bank_weight(module: Any, name: str) -> Tensor:
    """View a stacked weight as (experts, out, in)."""
    weight: Tensor = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def banks_of(model: nn.Module) -> dict[str, Bank]:
    """Find the stacked weights of a model, by their parameters' names."""
    return {
        f"{path}.{name}".lstrip("."): (module, name)
        for path, module in model.named_modules()
        if is_experts(module)
        for name in bank_names(module)
    }


def check_bank(full_name: str, bank: Bank) -> None:
    """Raise TypeError or ValueError where a stacked weight cannot be adapted."""
    module, name = bank
    weight: Any = getattr(module, name)
    where = f"experts: {full_name!r}"
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{where} is spread over processes by expert parallelism, expected every expert on "
            "every process; load the model without it, or leave out experts."
        )
    if is_dtensor(weight):
        raise ValueError(
            f"{where} is sharded over processes, expected a whole weight; patch first, then call "
            "rasa_ext.distributed.shard_model(model, mesh)."
        )
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"{where} is a {type(weight).__name__} of {weight.dtype}, expected floating-point "
            "weights; load the model dequantized, or leave out experts."
        )
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(
            f"{where} has the shape {tuple(weight.shape)}, expected a stack of matrices; gather "
            "sharded weights before patching, or leave out experts."
        )
