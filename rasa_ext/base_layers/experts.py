"""Stacked experts: modules that hold the weights of all experts in 3-D parameters.

transformers' ``use_experts_implementation`` sets attributes on such a module that describe the
layout of the weights. Only these attributes are read, except for a few classes without them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.layouts import MXFP4_EXPERTS, quantized_stack
from rasa_ext.base_layers.linear import is_linear

_MARKS = ("has_bias", "is_transposed", "_apply_gate")
_UNMARKED = {
    "Llama4TextExperts": {"is_transposed": True},
    "Step3p7Experts": {},
    MXFP4_EXPERTS: {"is_transposed": True, "has_bias": True, "is_concatenated": False},
}
"""transformers' classes without these attributes, and what theirs would be."""

_ROUTER = re.compile(r"gate|moe_gate|router.*|.*router|.*experts?_gate")


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds stacked experts of a known layout."""
    known = type(module).__name__ in _UNMARKED or all(hasattr(module, name) for name in _MARKS)
    return known and all(
        isinstance(getattr(module, name, None), Tensor) or quantized_stack(module, name) is not None
        for name in expert_weight_names(module)
    )


def has_quantized_experts(module: nn.Module) -> bool:
    """Return whether a module holds stacked experts of a packed layout."""
    return is_experts(module) and quantized_stack(module, "down_proj") is not None


def expert_weight_names(module: Any) -> tuple[str, str]:
    """Return the names of the input and the output stacked weight of experts."""
    return ("gate_up_proj" if has_gate(module) else "up_proj"), "down_proj"


def has_gate(module: Any) -> bool:
    """Return whether experts have a gate; in older releases of transformers all do."""
    return bool(getattr(module, "has_gate", True))


def is_transposed(module: Any) -> bool:
    """Return whether stacked weights have the layout (experts, in, out)."""
    return mark(module, "is_transposed")


def has_bias(module: Any) -> bool:
    """Return whether each stacked weight has a bias."""
    return mark(module, "has_bias")


def mark(module: Any, name: str, default: bool = False) -> bool:
    """Return an attribute that describes the layout of experts' weights."""
    unmarked: Mapping[str, bool] = _UNMARKED.get(type(module).__name__, {})
    return bool(getattr(module, name, unmarked.get(name, default)))


def activated(module: Any, y: Tensor) -> Tensor:
    """Apply the experts' activation to y: (S, 2I), or (S, I) without a gate."""
    if not has_gate(module):
        h: Tensor = module.act_fn(y)
    elif hasattr(module, "_apply_gate"):
        h = module._apply_gate(y)
    elif type(module).__name__ == MXFP4_EXPERTS:
        source = sys.modules["transformers.models.gpt_oss.modeling_gpt_oss"]
        h = source.GptOssExperts._apply_gate(module, y)
    else:
        gate, up = y.chunk(2, -1)
        h = up * module.act_fn(gate)
    return h


def has_post_expert_norm(module: Any) -> bool:
    """Return whether a norm follows each expert; in older releases of transformers none does."""
    return bool(getattr(module, "has_post_expert_norm", False))


def expert_shape(module: Any, name: str) -> tuple[int, int, int]:
    """Return (experts, out, in) of a stacked weight of any layout."""
    if (packed := quantized_stack(module, name)) is not None:
        return packed.shape
    experts, rows, columns = getattr(module, name).shape
    return (experts, columns, rows) if is_transposed(module) else (experts, rows, columns)


def expert_weight(module: Any, name: str) -> Tensor:
    """View a stacked weight as (experts, out, in); for Triton's, a placeholder."""
    weight: Tensor = getattr(module, name)
    if not isinstance(weight, Tensor):
        nothing = torch.empty((), dtype=torch.uint8, device=weight.device)
        return nothing.expand(expert_shape(module, name))
    return weight.transpose(1, 2) if is_transposed(module) else weight


def routers_of(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the routers: modules next to experts with a router's name."""
    return tuple(
        f"{path}.{key}".lstrip(".")
        for path, module in modules.items()
        for key, child in module.named_children()
        if _ROUTER.fullmatch(key) and (_knows_experts(module) or _knows_experts(child))
    )


def expert_weights(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights of experts and routers outside of linear layers, by name.

    They are 3-D parameters of modules outside ``torch.nn``, and, next to experts, also 2-D
    parameters, including embeddings.
    """
    shapes: dict[str, tuple[int, ...]] = {}
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
                shapes[f"{path}.{key}".lstrip(".")] = tuple(parameter.shape)
    return shapes


def _knows_experts(module: nn.Module) -> bool:
    """Return whether an attribute or a child of a module has "expert" in the name."""
    return any("expert" in key for key in (*vars(module), *module._modules))
