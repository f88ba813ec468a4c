"""Dense linear layers: ``nn.Linear``, and transformers' ``Conv1D``, whose weight is (in, out)."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
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


_LOOKED_AT = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta"})
_LOOKED_AT |= {"requires_grad", "to", "type_as", "isinstance", "hasattr", "getattr"}
"""What asks a weight how it is, and computes nothing with it."""

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


@torch.no_grad()
def computes_linear(module: LinearLayer) -> bool:
    """Tell whether a layer, of any subclass of nn.Linear, computes x W^T + bias.

    Where a subclass has a forward of its own, one row of input is tried.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return True
    weight = module.weight
    x = torch.linspace(-1, 1, module.in_features, device=weight.device).to(weight.dtype)[None]
    try:
        found, expected = kind.forward(module, x), nn.functional.linear(x, weight, module.bias)
        if found.shape != expected.shape or found.dtype != expected.dtype or found.is_meta:
            return found.shape == expected.shape and found.dtype == expected.dtype
        rounding = 0.02 * expected.abs().max().item()
        return torch.allclose(found, expected, rtol=0.0, atol=rounding, equal_nan=True)
    except Exception:  # whatever its code makes of an input that is not meant for it
        return False


def check_weight_is_stored(name: str, base: nn.Module) -> None:
    """Raise ValueError where a linear layer makes its weight of other tensors, time and again.

    So do weight_norm, spectral_norm and pruning of torch, and whatever is parametrized: what is
    added to the weight would be gone with the next forward.
    """
    if base._parameters.get("weight") is None:
        raise ValueError(
            f"model: the weight of {name!r} is made anew of other tensors ("
            f"{', '.join(key for key, _ in base.named_parameters() if key != 'bias')}), so that "
            "nothing can be merged into it; make it a plain one before patching, such as with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or keep the "
            "adapter unmerged."
        )


@functools.cache
def read_directly(parent: type[nn.Module]) -> frozenset[str]:
    """Name the children of a class whose ``weight`` its forward computes with by itself.

    That of an adapted child is the base's, so the adapter would have no effect there. It is what
    the source code says: a whole weight that is handed to a function or a product, or a part of one
    (``weight[:, :n]``) where the child itself is never called.
    """
    whole: set[str] = set()
    parts: set[str] = set()
    called: set[str] = set()
    for function in _run_by_forward(parent):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # no source: nothing is known
            continue
        users = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr=name, value=ast.Name("self"))):
                    called.add(name)
                case ast.Attribute(
                    attr="weight",
                    value=ast.Attribute(attr=name, value=ast.Name("self")),
                    ctx=ast.Load(),
                ):
                    user = users[node]
                    user = users[user] if isinstance(user, ast.keyword) else user
                    asks = user.func if isinstance(user, ast.Call) else user
                    if getattr(asks, "attr", getattr(asks, "id", None)) in _LOOKED_AT:
                        continue
                    handed = isinstance(user, ast.Call | ast.BinOp | ast.Tuple | ast.List)
                    (whole if handed else parts).add(name)
    return frozenset(whole | (parts - called))


def _run_by_forward(parent: type[nn.Module]) -> Iterator[FunctionType]:
    """Give the methods of a class that its forward calls, itself included."""
    names, seen = ["forward"], set()
    # The fast path of torch's encoder layer is switched off where one of its layers is adapted.
    kinds = [kind for kind in parent.__mro__ if kind not in (nn.Module, nn.TransformerEncoderLayer)]
    while names:
        name = names.pop()
        for kind in kinds:
            method = vars(kind).get(name)
            method = inspect.unwrap(method) if callable(method) else None
            if isinstance(method, FunctionType) and method not in seen:
                seen.add(method)
                names += method.__code__.co_names
                yield method
