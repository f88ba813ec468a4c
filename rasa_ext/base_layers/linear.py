"""Dense linear layers: ``nn.Linear``, and transformers' ``Conv1D``, whose weight is (in, out)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    class Conv1D(nn.Module):
        """transformers' Conv1D, as far as it is used here; that library is not imported."""

        nf: int
        weight: nn.Parameter
        bias: nn.Parameter


LinearLayer: TypeAlias = "nn.Linear | Conv1D"
"""A layer that ``is_linear``, for annotations."""


def is_conv1d(module: nn.Module | None) -> TypeIs[Conv1D]:
    """Tell whether ``module`` is transformers' Conv1D, a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> TypeIs[LinearLayer]:
    """Tell whether a module is a linear layer that can be adapted: nn.Linear or Conv1D.

    Those of bitsandbytes are nn.Linear too, and torchao's only have another weight.
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_shape(module: LinearLayer) -> tuple[int, int]:
    """(out, in) of a linear layer or Conv1D."""
    if is_conv1d(module):
        return module.nf, module.weight.shape[0]
    return module.out_features, module.in_features


def device_of(layer: LinearLayer) -> torch.device:
    """Give the device on which a layer computes, also where accelerate has offloaded its weight."""
    device: torch.device = layer.weight.device
    hook: Any = getattr(layer, "_hf_hook", None)
    if device.type == "meta" and hook is not None and hook.execution_device is not None:
        device = torch.device(hook.execution_device)
    return device


def as_plain_gemm(
    base: nn.Module | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a layer that is just ``x W^T + bias`` in ``dtype``, else None.

    None where the layer has hooks (offloading, pruning), a replaced ``forward``, quantized or
    sharded weights, a weight of another dtype, or is being trained itself.
    """
    transposed = False
    if type(base) is not nn.Linear:
        if not is_conv1d(base):
            return None
        transposed = True
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != dtype:
        return None
    if bias is not None and (bias.dtype != dtype or bias.requires_grad):
        return None
    return (weight.t() if transposed else weight), bias
