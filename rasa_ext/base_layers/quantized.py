"""Quantized bases: bitsandbytes' 4 and 8 bit layers, tensor classes, and packed layouts.

They are not plain GEMMs: the base runs first, and the adapter adds to the output. Layers of
bitsandbytes, torchao and quanto run with the library's kernels, packed layouts with ``layouts``.
This module serves patching and merging: it detects quantized layers, refuses those whose forward
gives no gradient, and dequantizes weights.

No library is imported here: if a model has such a layer, the library is imported already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rasa_ext.base_layers.experts import has_quantized_experts, is_experts
from rasa_ext.base_layers.layouts import (
    CHANGED,
    MXFP4_EXPERTS,
    Format,
    Layout,
    layout_of,
    quantized_stack,
    tiled_linear,
)
from rasa_ext.base_layers.linear import LinearLayer, linear_shape, stored_weight
from rasa_ext.base_layers.sharded import is_dtensor

# Attributes that transformers sets on a quantized model, and a flag of bitsandbytes' Linear4bit.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
_TENSORS = (
    ("torchao", "torchao.utils", "TorchAOBaseTensor"),
    ("quanto", "optimum.quanto", "QTensor"),
)
"""Libraries with quantized tensors: the name, the module, and the base class of the tensors."""

ROTATED = (
    "config.quantization_config has rotations (transform_config), as of QuIP or SpinQuant, which "
    "transformers skips, so the weights are wrong; load a checkpoint without them."
)
_INSTEAD = "load the model dequantized, or in a layout that docs/quantized.md lists"
_KERNELS = (
    ": for GPTQ pass quantization_config=GPTQConfig(bits=4, backend='gptq_torch') to "
    "from_pretrained, for AWQ AwqConfig(backend='torch_awq')"
)
_BNB_REPACK_FLAG = "support_avx512bf16_for_cpu"


class BnbLinear4bit(Format):
    """bitsandbytes' Linear4bit: nf4 or fp4 in blocks, two values in each byte."""

    def check(self, name: str, base: LinearLayer) -> None:
        """Raise ValueError if the layer is not quantized yet, or on a CPU if blocks cross rows."""
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            _raise_unquantized(name, self.name)
        _, in_features = linear_shape(base)
        if base.weight.device.type == "cpu" and in_features % state.blocksize:
            raise ValueError(
                f"{name!r} ({self.name}) has {in_features} inputs, expected a multiple of the "
                f"block size {state.blocksize}: otherwise bitsandbytes computes wrong values on a "
                "CPU; do not quantize this layer, use a GPU"
            )

    def original_dtype(self, base: Any) -> torch.dtype | None:
        """See ``Format``."""
        dtype: torch.dtype | None = base.weight.quant_state.dtype
        return dtype

    def dequantize(self, base: Any) -> Tensor:
        """See ``Format``."""
        own = base.weight
        weight: Tensor = _bitsandbytes().functional.dequantize_4bit(own.data, own.quant_state)
        return weight


class BnbLinear8bit(Format):
    """bitsandbytes' Linear8bitLt: int8 with one scale for each row."""

    def check(self, name: str, base: Any) -> None:
        """Raise ValueError if the layer is not quantized yet, unless it uses float weights."""
        if base.weight.dtype != torch.int8 and not base.state.has_fp16_weights:
            _raise_unquantized(name, self.name)

    def dequantize(self, base: Any) -> Tensor:
        """See ``Format``."""
        weight: Tensor = base.weight
        if weight.dtype != torch.int8:
            return weight.data
        # The scales are on the weight before the first forward, and on the state after it.
        scales: Tensor = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        return weight.data * (scales.to(weight.device).float() / 127).unsqueeze(1)


def _raise_unquantized(name: str, fmt: str) -> NoReturn:
    raise ValueError(f"{name!r} ({fmt}) is not quantized yet; call model.to(device) first")


class QuantizedTensor(Format):
    """nn.Linear with a weight of one of torchao's or quanto's tensor classes."""

    def dequantize(self, base: LinearLayer) -> Tensor:
        """Call the tensor's ``dequantize``, or read W from a product with an identity matrix."""
        try:
            return base.weight.dequantize()
        except (AttributeError, NotImplementedError):
            weight = base.weight
            identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            return nn.functional.linear(identity, weight).t()

    def original_dtype(self, base: LinearLayer) -> torch.dtype | None:
        """Return the dtype that the tensor reports."""
        return base.weight.dtype


def format_of(module: nn.Module) -> Format | None:
    """Return the format of a linear layer's quantized weight, or None if it is not quantized."""
    library = getattr(_bitsandbytes(), "nn", None)
    if isinstance(module, getattr(library, "Linear4bit", ())):
        return BnbLinear4bit(f"bitsandbytes {getattr(module.weight, 'quant_type', '4 bit')}")
    if isinstance(module, getattr(library, "Linear8bitLt", ())):
        return BnbLinear8bit("bitsandbytes int8")
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    for by, source, kind in _TENSORS:
        if isinstance(weight, getattr(sys.modules.get(source), kind, ())):
            return QuantizedTensor(f"{by} {type(weight).__name__}")
    return layout_of(module)


def _bitsandbytes() -> Any:
    """Return bitsandbytes if it is imported, else None."""
    return sys.modules.get("bitsandbytes")


def stored_bytes(base: LinearLayer) -> int:
    """Return the bytes of a layer's quantized weight, with scales and whatever else it needs."""
    weight, fmt = stored_weight(base), format_of(base)
    if isinstance(fmt, QuantizedTensor):
        return _inner_bytes(weight)
    if isinstance(fmt, Layout):
        own = {**base._parameters, **base._buffers}
        parts = [tensor for name, tensor in own.items() if name != "bias"]
    else:
        state = getattr(weight, "quant_state", None)
        nested = getattr(state, "state2", None)
        parts = [weight.data, getattr(weight, "SCB", None)]
        parts += [getattr(holder, "absmax", None) for holder in (state, nested)]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _inner_bytes(tensor: Any) -> int:
    """Return the bytes of the plain tensors inside a tensor of a subclass."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_inner_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def forget_quantizer(model: nn.Module) -> nn.Module:
    """Remove transformers' quantization attributes from a model without quantized layers.

    Otherwise they would be saved, and loading would quantize again. Returns the model.
    """
    modules = list(model.modules())
    if not any(getattr(module, "is_quantized", False) for module in modules):
        return model
    if any(format_of(module) is not None for module in modules):
        return model
    for module in modules:
        for name in _MARKS:
            module.__dict__.pop(name, None)
        config = module.__dict__.get("config")
        for name in ("quantization_config", "_is_quantized"):
            getattr(config, "__dict__", {}).pop(name, None)
    return model


def misread(modules: Iterable[nn.Module]) -> str | None:
    """Return why a model does not hold the numbers of a quantized checkpoint, or None if it does.

    transformers leaves ``config.quantization_config`` a dictionary if it does not know the method.
    It then loads stored integers or FP8 numbers as they are, and drops the scales. It also drops
    compressed-tensors' rotations, of which only config.json tells.
    """
    modules = list(modules)
    loaded = (getattr(m, "config", None) for m in modules if "hf_quantizer" in vars(m))
    if any(is_rotated(_stored_settings(config)) for config in loaded):
        return ROTATED
    configs = (getattr(module, "config", None) for module in modules)
    given = (getattr(config, "quantization_config", None) for config in configs)
    unknown = next((settings for settings in given if isinstance(settings, dict)), None)
    if unknown is None or any("hf_quantizer" in vars(m) or format_of(m) for m in modules):
        return None
    return (
        f"config.quantization_config has quant_method {unknown.get('quant_method')!r}, which "
        "transformers did not read: it dropped the scales, so the weights are wrong; "
        "docs/quantized.md lists what can be loaded, and how. If the weights were dequantized "
        "before loading, delete config.quantization_config."
    )


def is_rotated(settings: Mapping[str, Any]) -> bool:
    """Return whether quantization settings have rotations that no stored weight contains."""
    groups = ((settings.get("transform_config") or {}).get("config_groups") or {}).values()
    uses = (use for group in groups for use in group.get("apply") or ())
    return any(not str(use.get("location")).startswith("weight_") for use in uses)


def _stored_settings(config: Any) -> dict[str, Any]:
    """Return the quantization settings of a model's config.json, if the file is on this machine."""
    try:
        stored, _ = config.get_config_dict(config._name_or_path, local_files_only=True)
    except (AttributeError, OSError, ValueError):
        return {}
    return stored.get("quantization_config") or {}


def check_gradients(modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a layer of the model, adapted or not, would block the gradient.

    An adapter over such a layer would train, and every layer below would silently get no gradient.
    Refused are quantized layers of a layout that is not known, layers whose forward gives the input
    no gradient, and a Linear4bit that has rearranged the weight (see ``quantizer_changes``): the
    library's inverse rounds the scales, so that it does not restore the weight exactly.
    """
    if (reason := misread(modules.values())) is not None:
        raise ValueError(f"model: {reason}")
    tried: dict[Any, bool] = {}
    for name, module in modules.items():
        fmt, kind = format_of(module), type(module).__name__
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(fmt, BnbLinear4bit) and getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: {name!r} ({fmt.name}) has rearranged the weight for evaluation, as "
                "bitsandbytes does on some CPUs, and no longer passes gradients to its input; load "
                "the model again and patch it before evaluating."
            )
        if (
            isinstance(fmt, Layout)
            and stored_weight(module).is_meta
            and hasattr(module, "_hf_hook")
        ):
            raise ValueError(
                f"model: {name!r} ({fmt.name}) is offloaded by accelerate, expected packed weights "
                "on a device, since a backward reads them again; load the model without offloading."
            )
        if fmt is None and (dtype := _unknown_dtype(module)) is not None:
            changed = next((key for key in CHANGED if getattr(module, key, None)), None)
            how = "in an unknown layout, so layers below might get no gradient"
            how = f"and {changed!r}, which would be left out" if changed else how
            raise ValueError(
                f"model: {name!r} is a {kind} with a weight of {dtype} {how}; {_INSTEAD}"
                f"{_KERNELS if hasattr(module, 'qweight') and not changed else ''}."
            )
        if _blocks_experts(module):
            raise ValueError(
                f"model: {name!r} is a {kind}, quantized experts that pass no gradient to their "
                "input; load the model dequantized, such as with Mxfp4Config(dequantize=True)."
            )
        if isinstance(module, nn.Linear) and (fmt is None or isinstance(fmt, QuantizedTensor)):
            key: Any = module
            if "forward" not in module.__dict__:
                weight: Any = module._parameters.get("weight")
                key = type(module), type(weight), getattr(weight, "device", None)
            if key not in tried:
                tried[key] = _blocks_gradient(module)
            if tried[key]:
                raise ValueError(
                    f"model: {name!r} ({kind if fmt is None else fmt.name}) passes no gradient to "
                    "its input; load the model in another layout, or dequantized."
                )


def _unknown_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of a linear layer's packed weight, or None if the weight is dense.

    An embedding that compressed-tensors packs counts as well: its forward needs the library's hook.
    """
    if isinstance(module, nn.Embedding):
        weight = stored_weight(module)
        packed = hasattr(module, "quantization_scheme") and _is_packed(weight)
        return weight.dtype if packed else None
    own = (t for t in (*module.parameters(False), *module.buffers(False)) if not is_lazy(t))
    matrices = [t for t in own if t.dim() > 1]
    sizes = (getattr(module, f"{way}_features", None) for way in ("in", "out"))
    width, out = (size if isinstance(size, int) else 0 for size in sizes)
    if width * out:
        dense = any(t.numel() == width * out and not _is_packed(t) for t in matrices)
        return None if dense else next((t.dtype for t in matrices if _is_packed(t)), None)
    # Libraries call the sizes by other names, or not at all; int64 is of positions and tables.
    largest = max(matrices, key=Tensor.numel, default=None)
    if largest is None or any(module.children()) or largest.dim() > 2 or 1 in largest.shape:
        return None
    return largest.dtype if _is_packed(largest) and largest.dtype != torch.int64 else None


def _is_packed(tensor: Tensor) -> bool:
    """Return whether a tensor's elements are integers, or floats of one byte."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.itemsize == 1
    return tensor.dtype != torch.bool


def _blocks_experts(module: nn.Module) -> bool:
    """Return whether a module holds quantized experts that are not computed here."""
    stacks = [
        name
        for name, tensor in module.named_parameters(recurse=False)
        if _is_packed(tensor) and tensor.dim() == 3 and not name.endswith("_scale_inv")
    ]
    known = is_experts(module) and all(quantized_stack(module, name) for name in stacks)
    return (type(module).__name__ == MXFP4_EXPERTS or bool(stacks)) and not known


def _blocks_gradient(module: nn.Linear) -> bool:
    """Return whether one row of input gets no gradient; not tried for torch's own forward."""
    weight, kind = module._parameters.get("weight"), type(module)
    usual = kind.forward is nn.Linear.forward and "forward" not in module.__dict__
    if weight is None or (usual and type(weight) is nn.Parameter) or hasattr(module, "_hf_hook"):
        return False
    if weight.is_meta or is_dtensor(weight) or not weight.is_floating_point():
        return False
    with torch.enable_grad():
        x = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device)
        x.requires_grad_()
        try:
            y = module.forward(x)
        except Exception:  # it cannot run here, or wants another input
            return False
        if not isinstance(y, Tensor):  # a router's choices
            return False
        try:
            return torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None
        except RuntimeError:  # no part of it has a backward
            return True


def quantizer_changes(model: nn.Module, hide_quantizer: bool) -> list[tuple[nn.Module, str, Any]]:
    """Return the attributes to change so that gradients pass quantized layers, adapted or not.

    Layers of a packed layout run by tiles, and compressed-tensors' hook, which would make the model
    dense in its first forward, is left out. On a CPU with AVX512-BF16, bitsandbytes' Linear4bit
    rearranges the weight in the first forward without grad in eval mode; from then on the input
    silently gets no gradient. With ``hide_quantizer`` the model does not report that it is
    quantized: transformers' Trainer would assume that it has no adapter. A model with experts in
    MXFP4 never does, since Trainer refuses to train over them, even in PEFT.

    Returns:
        The module, the name and the new value of each attribute.
    """
    changes: list[tuple[nn.Module, str, Any]] = []
    formats = {module: fmt for module in model.modules() if (fmt := format_of(module)) is not None}
    base: Any
    for base, fmt in formats.items():
        if isinstance(fmt, Layout):
            inner = "_old_forward" if hasattr(base, "_old_forward") else "forward"  # accelerate's
            changes.append((base, inner, functools.partial(tiled_linear, fmt, base)))
        elif getattr(base, _BNB_REPACK_FLAG, False):
            changes.append((base, _BNB_REPACK_FLAG, False))
    experts = [module for module in model.modules() if has_quantized_experts(module)]
    triton = [module for module in experts if type(module).__name__ == MXFP4_EXPERTS]
    # Their parent then calls the router and ``forward``, not only Triton's kernels.
    changes += [(module, "_is_hooked", True) for module in triton]
    for module in model.modules() if formats or experts else ():
        if (handle := module.__dict__.get("ct_decompress_hook")) is not None:
            hooks = module._forward_pre_hooks.copy()
            hooks.pop(handle.id, None)
            changes.append((module, "_forward_pre_hooks", hooks))
        if (hide_quantizer or triton) and module.__dict__.get("is_quantized", False):
            changes.append((module, "is_quantized", False))
    return changes
