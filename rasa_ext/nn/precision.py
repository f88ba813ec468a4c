"""Restores the config's dtype of an adapter that was cast.

Steps of d are smaller than bfloat16 resolves, so a cast d would silently stop training. TRL's
trainers cast all trained parameters over a quantized base, through ``.data``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rasa_ext.base_layers.sharded import is_dtensor

# Attributes of a temporary copy: FSDP, DeepSpeed or DistributedDataParallel's mixed precision holds
# the parameter itself in another dtype.
_COPIES = ("_fsdp_flattened", "ds_id", "_hp_mapping", "_mp_param")


def restored(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> None:
    """Cast trainable parameters of a coarser dtype to ``dtype``.

    Parameters change in place, so that an optimizer still refers to them, and a warning is given.
    Raises RuntimeError if several processes train: DistributedDataParallel would no longer average
    the gradients of wrapped parameters, and this function cannot see whether they are wrapped.
    """
    coarse = [tensor for tensor in tensors if tensor is not None and _is_coarse(tensor, dtype)]
    if coarse and is_sharing() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"a trained adapter was cast to {coarse[0].dtype}, in which optimizer steps of the "
            f"diagonal would be lost; before any process wraps the model, run p.data = "
            f"p.data.to({dtype}) for every p of model.parameters() that requires a gradient."
        )
    for parameter in coarse:
        before = parameter.dtype
        parameter.data = parameter.data.to(dtype)
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to(dtype)
    if coarse:
        warnings.warn(
            f"a trained adapter was cast to {before}, in which optimizer steps of the diagonal "
            f"would be lost; it is {dtype} again, the config's adapter_dtype. An optimizer that "
            "copies parameters must be made after this: call model.train() first.",
            stacklevel=1,  # one place, so that the warning appears once
        )


def _is_coarse(parameter: Tensor, dtype: torch.dtype) -> bool:
    if parameter.dtype == dtype or not parameter.requires_grad:
        return False
    if not isinstance(parameter, nn.Parameter) or parameter.is_meta or is_dtensor(parameter):
        return False
    if any(hasattr(parameter, name) for name in _COPIES):
        return False
    return torch.finfo(parameter.dtype).eps > torch.finfo(dtype).eps


def is_sharing() -> bool:
    """Return whether several processes train, so that a parameter may be a temporary copy."""
    return dist.is_available() and dist.is_initialized()
