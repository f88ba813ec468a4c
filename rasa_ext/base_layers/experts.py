"""Stacked experts: modules that hold the weights of all their experts in 3-D parameters.

transformers marks such a module with attributes (its ``use_experts_implementation``) that say how
the weights lie. They are all that is asked for here, whatever the module's class, but for a few
classes that have no such marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.linear import is_linear
from rasa_ext.base_layers.sharded import is_dtensor

ExpertWeight = tuple[nn.Module, str]
"""One stacked weight: the module, and the name of its parameter."""

_MARKS = ("has_bias", "is_transposed", "_apply_gate")
_UNMARKED = {"Llama4TextExperts": True, "Step3p7Experts": False}
"""Classes of transformers without those marks: whether their weights are transposed."""

_ROUTER = re.compile(r"gate|moe_gate|router.*|.*router|.*experts?_gate")


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds stacked experts of which it is known how they lie."""
    known = type(module).__name__ in _UNMARKED or all(hasattr(module, mark) for mark in _MARKS)
    weights = (getattr(module, name, None) for name in expert_weight_names(module))
    return known and all(isinstance(weight, Tensor) for weight in weights)


def expert_weight_names(module: Any) -> tuple[str, str]:
    """Name the stacked weights of experts: the one on their input, the one on their output."""
    return ("gate_up_proj" if has_gate(module) else "up_proj"), "down_proj"


def has_gate(module: Any) -> bool:
    """Tell whether experts multiply by a gate; older releases of transformers knew no others."""
    return bool(getattr(module, "has_gate", True))


def is_transposed(module: Any) -> bool:
    """Tell whether a stacked weight lies as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", _UNMARKED.get(type(module).__name__, False)))


def has_bias(module: Any) -> bool:
    """Tell whether each stacked weight has a bias."""
    return bool(getattr(module, "has_bias", False))


def activated(module: Any, y: Tensor) -> Tensor:
    """Give what experts make of the product (S, 2I), or (S, I) without a gate, with their input."""
    if not has_gate(module):
        found: Tensor = module.act_fn(y)
    elif hasattr(module, "_apply_gate"):
        found = module._apply_gate(y)
    else:
        gate, up = y.chunk(2, -1)
        found = up * module.act_fn(gate)
    return found


def has_post_expert_norm(module: Any) -> bool:
    """Tell whether a norm follows each expert; older releases of transformers knew none."""
    return bool(getattr(module, "has_post_expert_norm", False))


def expert_shape(module: Any, name: str) -> tuple[int, int, int]:
    """Give (experts, out, in) of a stacked weight, however it lies."""
    experts, rows, columns = getattr(module, name).shape
    return (experts, columns, rows) if is_transposed(module) else (experts, rows, columns)


def expert_weight(module: Any, name: str) -> Tensor:
    """View a stacked weight as (experts, out, in)."""
    weight: Tensor = getattr(module, name)
    return weight.transpose(1, 2) if is_transposed(module) else weight


def check_expert_weight(full_name: str, stack: ExpertWeight) -> None:
    """Raise TypeError or ValueError where a stacked weight cannot be adapted."""
    module, name = stack
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


def routers_of(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Name the modules that choose experts or weigh them: by their names, beside experts."""
    return tuple(
        f"{path}.{key}".lstrip(".")
        for path, module in modules.items()
        for key, child in module.named_children()
        if _ROUTER.fullmatch(key) and (_knows_experts(module) or _knows_experts(child))
    )


def expert_weights(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Find the weights of experts and routers that are no linear layers', with their shapes.

    They are 3-D parameters of modules that are not torch's own, and beside experts 2-D ones as
    well, also in embeddings.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path, module in modules.items():
        usual = type(module).__module__.startswith("torch.nn")
        if is_linear(module) or (usual and not isinstance(module, nn.Embedding)):
            continue
        beside = _knows_experts(module) or _knows_experts(modules[path.rpartition(".")[0]])
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter) or key.endswith("bias"):
                continue
            stacked = parameter.dim() == 3 and min(parameter.shape) > 1 and not usual
            if stacked or (beside and parameter.dim() > 1):
                found[f"{path}.{key}".lstrip(".")] = tuple(parameter.shape)
    return found


def _knows_experts(module: nn.Module) -> bool:
    """Tell whether a module has anything that is named after experts, such as their number."""
    return any("expert" in key for key in (*vars(module), *module._modules))
