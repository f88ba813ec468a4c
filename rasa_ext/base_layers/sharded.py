"""Detects sharded adapters and bases, and raises if they cannot be used.

Layers share a pool, so every layer needs the whole pool on each process. ``fully_shard`` and
``FullyShardedDataParallel`` over an adapter, and ZeRO-3, gather a parameter only while the module
that owns it runs; ``rasa_ext.distributed.shard_model`` shards the base alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.linear import stored_weight

SHARDING_HINT = (
    "shard with rasa_ext.distributed.shard_model(model, mesh), which keeps the whole adapter on "
    "every process, instead of using fully_shard, FullyShardedDataParallel or ZeRO-3 on the adapter"
)
_PLAIN = (nn.Parameter, Tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing that class."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def is_whole(matrix: Tensor) -> bool:
    """Return whether a matrix or stack is whole: not a DTensor, nor sharded by FSDP1 or ZeRO-3."""
    return matrix.dim() >= 2 and not is_dtensor(matrix)


def is_emptied(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has removed a parameter's elements for now."""
    return is_of_zero_3(parameter) and parameter.numel() == 0


def is_of_zero_3(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 gathers a parameter for the forward of a single module."""
    return hasattr(parameter, "ds_id")


def what_is_here(tensor: Tensor) -> str:
    """Describe the piece of a tensor that this process has."""
    if is_dtensor(tensor):
        return f"a DTensor, placed as {tuple(map(str, getattr(tensor, 'placements', ())))}"
    if tensor.numel() == 0:
        return "empty on this process, as under ZeRO-3"
    return f"of shape {tuple(tensor.shape)} on this process"


def check_whole(**matrices: Tensor | None) -> None:
    """Raise RuntimeError if an adapter's matrices, by name, are not whole in a forward."""
    for name, matrix in matrices.items():
        if matrix is not None and not is_whole(matrix):
            raise RuntimeError(
                f"expected an adapter that is whole on every process, but its {name} is "
                f"{what_is_here(matrix)}; {SHARDING_HINT}."
            )


def sharded_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules with a parameter that ``fully_shard`` shards, gathered or not.

    A gathered parameter looks like any other, but has the value before the optimizer's step.
    """
    found: set[int] = set()
    for module in model.modules():
        state_of: Any = getattr(module, "_get_fsdp_state", None)
        if state_of is None:
            continue
        state = state_of()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in group.fsdp_params if group else ():
                info = parameter._module_info
                found.update(map(id, (info.module, *info.shared_modules)))
    return found


def check_base_whole(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise ValueError if a merge could not permanently change a base layer's weight."""
    sharded = sharded_modules(model)
    for name, base in layers.items():
        weight = stored_weight(base)
        if id(base) in sharded or is_dtensor(weight) or weight.dim() < 2 or is_emptied(weight):
            raise ValueError(
                f"model: expected whole base weights to merge into, but the weight of {name!r} "
                "is sharded; save the adapter, load it into a model that is not sharded, and merge "
                "there."
            )
