"""What engines that shard a model, FSDP1, FSDP2 and ZeRO-3, make of tensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from rasa_ext.base_layers.linear import stored_weight

SHARDING_HINT = "patch a whole model, then shard it"
_PLAIN = (nn.Parameter, Tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing that class."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether an engine shards a tensor, gathered or not: FSDP2, FSDP1 or ZeRO-3."""
    return is_dtensor(tensor) or is_of_zero_3(tensor) or hasattr(tensor, "_fsdp_flattened")


def check_sharded_together(own: Iterable[Tensor], pool: Iterable[Tensor]) -> None:
    """Raise RuntimeError if an engine shards a layer's tensors, but not those of the pool."""
    if any(map(is_sharded, own)) and not all(map(is_sharded, pool)):
        raise RuntimeError(
            "expected an engine that shards layers together with the pool that they share, but it "
            "shards only the layers, so each process would train a pool of its own; wrap the "
            "module around the layers too, which has the rasa_pool parameters, or the whole model: "
            "fully_shard(model)."
        )


def is_whole(matrix: Tensor) -> bool:
    """Return whether a matrix or stack is whole now; FSDP1 and ZeRO-3 leave a flat piece."""
    return matrix.dim() >= 2 and not is_dtensor(matrix)


def is_emptied(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has removed a parameter's elements for now."""
    return parameter.numel() == 0 and getattr(parameter, "ds_numel", 0) > 0


def gather(tensors: Iterable[Tensor]) -> None:
    """Gather tensors that ZeRO-3 has removed, now and whenever the running module runs again."""
    emptied: list[Any] = [parameter for parameter in tensors if is_emptied(parameter)]
    if emptied:
        parameter_offload: Any = import_module("deepspeed.runtime.zero.parameter_offload")

        for parameter in emptied:
            running = parameter_offload.FWD_MODULE_STACK[-1]
            parameter_offload.register_external_parameter(running, parameter)
            parameter.all_gather()


def check_not_reentrant(pool: Iterable[Tensor]) -> None:
    """Raise RuntimeError in a re-entrant checkpoint's backward, if ZeRO-3 shards the pool.

    Every checkpoint is a backward of its own there, and ZeRO-3 takes one gradient of a tensor.
    """
    if not any(map(is_of_zero_3, pool)):
        return
    frame: FrameType | None = sys._getframe()
    while (frame := frame and frame.f_back) is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            raise RuntimeError(
                "expected checkpoints of use_reentrant=False, since ZeRO-3 takes one gradient of a "
                "pool that layers share. TRL asks for others; after its trainer is made, set "
                'trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": False}.'
            )


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


def reshard(model: nn.Module) -> None:
    """Make FSDP2 forget what it has gathered, which may be older than an optimizer's step."""
    for module in model.modules():
        if (again := getattr(module, "reshard", None)) and hasattr(module, "_get_fsdp_state"):
            again()


@contextlib.contextmanager
def gathered(
    model: nn.Module, tensors: Collection[Tensor], *, write: bool = False
) -> Iterator[bool]:
    """Gather tensors of a model that FSDP1 or ZeRO-3 shard; every process must enter the context.

    FSDP2's stay DTensors: ``whole`` reads them, and ``fill`` writes them. With ``write``, values
    may be written; under ZeRO-3 the first process's count.

    The context gives whether this process writes files: the first one if an engine shards the
    model, else any. The others wait for it at the end.
    """
    shared = any(map(is_sharded, model.parameters()))
    with contextlib.ExitStack() as stack:
        if shared:
            stack.callback(dist.barrier)
        if any(hasattr(tensor, "_fsdp_flattened") for tensor in tensors):
            from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1

            stack.enter_context(Fsdp1.summon_full_params(model, writeback=write))
        if removed := [tensor for tensor in tensors if is_of_zero_3(tensor)]:
            zero: Any = import_module("deepspeed").zero
            rank = 0 if write else None
            stack.enter_context(zero.GatheredParameters(removed, modifier_rank=rank))
        yield not shared or dist.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's values; every process must call this."""
    shard: Any = tensor
    return shard.full_tensor() if is_dtensor(tensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values, which every process has, into a tensor or this process's part of it."""
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        shard: Any = tensor
        values = values.to(shard.device, shard.dtype)
        values = distribute_tensor(values, shard.device_mesh, shard.placements)
    tensor.copy_(values)


def sharded_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules with a parameter that ``fully_shard`` shards, gathered or not.

    A gathered parameter looks like any other, but has the value before the optimizer's step.
    """
    ids: set[int] = set()
    for module in model.modules():
        state_of: Any = getattr(module, "_get_fsdp_state", None)
        if state_of is None:
            continue
        state = state_of()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in group.fsdp_params if group else ():
                info = parameter._module_info
                ids.update(map(id, (info.module, *info.shared_modules)))
    return ids


def check_base_whole(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise ValueError if a merge could not permanently change a base layer's weight."""
    sharded = sharded_modules(model)
    for name, base in layers.items():
        weight = stored_weight(base)
        if id(base) in sharded or is_dtensor(weight) or weight.dim() < 2 or is_emptied(weight):
            raise ValueError(
                f"model: expected whole base weights to merge into, but the weight of {name!r} "
                "is sharded; save the adapter, and load and merge it in a whole model."
            )
