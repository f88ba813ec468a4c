"""Dense linear layers: ``nn.Linear``, and transformers' ``Conv1D``, whose weight is (in, out)."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    class Conv1D(nn.Module):
        """The used part of transformers' Conv1D, without importing transformers."""

        nf: int
        weight: nn.Parameter
        bias: nn.Parameter


_LOOKED_AT = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta"})
_LOOKED_AT |= {"requires_grad", "to", "type_as", "isinstance", "hasattr", "getattr"}
"""Attributes and functions that inspect a weight without computing with it."""

LinearLayer: TypeAlias = "nn.Linear | Conv1D"
"""The type of a layer for which ``is_linear`` is true."""


def is_conv1d(module: nn.Module | None) -> TypeIs[Conv1D]:
    """Return whether a module is transformers' Conv1D, a linear layer with a weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> TypeIs[LinearLayer]:
    """Return whether a module is a linear layer: nn.Linear, Conv1D, or one of GPTQ or AWQ.

    Linear layers of most libraries are subclasses of nn.Linear; torchao only replaces the weight.
    """
    packed = "qweight" in module._buffers or "qweight" in module._parameters  # GPTQ, AWQ
    return isinstance(module, nn.Linear) or is_conv1d(module) or packed


def linear_shape(module: LinearLayer) -> tuple[int, int]:
    """Return (out, in) of a linear layer."""
    if is_conv1d(module):
        return module.nf, module.weight.shape[0]
    layer: Any = module
    if hasattr(layer, "infeatures"):  # AutoRound's names
        return layer.outfeatures, layer.infeatures
    return layer.out_features, layer.in_features


def stored_weight(layer: Any) -> Tensor:
    """Return the tensor that holds a layer's weight, as numbers or packed."""
    names = ("weight_packed", "qweight", "weight")
    for name in names:
        weight: Tensor | None = getattr(layer, name, None)
        if weight is not None:
            return weight
    raise TypeError(
        f"target_modules: expected layers with a tensor called {' or '.join(names)}, got a "
        f"{type(layer).__name__} without one."
    )


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight is an ordinary tensor of floats, not a quantized or sharded one."""
    usual = type(weight) in (nn.Parameter, Tensor)
    return usual and weight.is_floating_point() and weight.itemsize > 1


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes: autocast's, or the dtype of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def device_of(layer: LinearLayer) -> torch.device:
    """Return the device on which a layer computes, also if accelerate offloads the weight."""
    device: torch.device = stored_weight(layer).device
    hook: Any = getattr(layer, "_hf_hook", None)
    if device.type == "meta" and hook is not None and hook.execution_device is not None:
        device = torch.device(hook.execution_device)
    return device


def as_plain_gemm(
    base: nn.Module | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None] | None:
    """Return weight (out, in) and bias of a layer that is just ``x W^T + bias`` in ``dtype``.

    Return None if the layer has hooks (offloading, pruning), a replaced ``forward``, a quantized or
    sharded weight, a weight of another dtype, or is trained.
    """
    transposed = False
    if type(base) is not nn.Linear:
        if not is_conv1d(base):
            return None
        transposed = True
    own = base.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return None
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != dtype:
        return None
    if bias is not None and (bias.dtype != dtype or bias.requires_grad):
        return None
    return (weight.t() if transposed else weight), bias


@torch.no_grad()
def computes_linear(module: LinearLayer) -> bool:
    """Return whether a linear layer, also of a subclass of nn.Linear, computes x W^T + bias.

    If a subclass overrides ``forward``, one row of input is tried. Rounding W to 4 bits, which is
    off by 0.07 to 0.12, is allowed.
    """
    kind: Any = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return True
    return _product_error(module, functools.partial(kind.forward, module)) < 0.3


def _product_error(module: nn.Linear, forward: Callable[[Tensor], Tensor]) -> float:
    """Return the relative error in the norm of one row's output against x W^T + bias."""
    weight = module.weight
    x = torch.linspace(-1, 1, module.in_features, device=weight.device).to(weight.dtype)[None]
    try:
        output, expected = forward(x), nn.functional.linear(x, weight, module.bias)
        if output.shape != expected.shape or output.dtype != expected.dtype:
            return math.inf
        if output.is_meta:
            return 0.0
        output, expected = (y.double().nan_to_num() for y in (output, expected))
        return float((output - expected).norm() / expected.norm().clamp_min(1e-300))
    except Exception:  # the code may fail in any way on an unexpected input
        return math.inf


@torch.no_grad()
def check_weight_is_stored(name: str, base: nn.Module) -> None:
    """Raise ValueError if a linear layer would not compute with a weight that a merge changed.

    torch's weight_norm, spectral_norm, pruning and parametrizations compute the weight from other
    tensors in each forward, and layers for quantization-aware training round it.
    """
    weight = base._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"model: the weight of {name!r} is computed from other tensors ("
            f"{', '.join(key for key, _ in base.named_parameters() if key != 'bias')}), so a merge "
            "cannot change it; make it a plain parameter before patching, for example with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or keep the "
            "adapter unmerged."
        )
    usual = type(base).forward is nn.Linear.forward and "forward" not in base.__dict__
    if not isinstance(base, nn.Linear) or usual or weight.is_meta:
        return
    stored = weight.data
    try:  # a stored weight may be rounded already, so another one is tried
        scale = torch.linspace(0.9, 1, base.in_features, device=weight.device)
        weight.data = (stored * scale).to(stored.dtype)
        error = _product_error(base, base.forward)
    finally:
        weight.data = stored
    if error > max(torch.finfo(stored.dtype).eps / 2, 1e-3):
        raise ValueError(
            f"model: {name!r} ({type(base).__name__}) does not compute with the weight that a "
            f"merge would write: the output is off by {error:.1e}, as where each forward rounds "
            "the weight; make it a plain nn.Linear before patching, or keep the adapter unmerged."
        )


@functools.cache
def read_directly(parent: type[nn.Module]) -> frozenset[str]:
    """Return the names of children whose ``weight`` the forward of a class uses directly.

    An adapted child's ``weight`` is the base's weight, so the adapter would have no effect there.
    The source code shows it: a whole weight is an operand or an argument, or a part of a weight
    (``weight[:, :n]``) is used and the child is never called.
    """
    whole: set[str] = set()
    parts: set[str] = set()
    called: set[str] = set()
    for function in _run_by_forward(parent):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # no source, so nothing to report
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
    """Yield the forward of a class and all methods that it calls."""
    names, seen = ["forward"], set()
    # torch's encoder layer does not use the fast path if one of the layers is adapted.
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
