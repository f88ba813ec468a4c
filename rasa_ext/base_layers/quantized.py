"""Quantized bases: bitsandbytes' 4 and 8 bit layers, and torchao's tensors.

They are not plain GEMMs: the base runs first, with the library's kernels, and the adapter adds to
the output. This module serves patching and merging: it detects quantized layers and dequantizes
their weights.

Neither library is imported here: if a model has such a layer, the library is imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import LinearLayer, linear_shape

# Attributes that transformers sets on a quantized model, and a flag of bitsandbytes' Linear4bit.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
_BNB_REPACK_FLAG = "support_avx512bf16_for_cpu"

_FORWARD_ONLY = frozenset({"Int4OpaqueTensor"})
"""torchao's tensor classes without a backward: int4 packed for CPUs."""

_READ_AT_ONCE = 1024
"""How many columns of a weight one product reads in ``_read_off``."""


class Format:
    """A format of quantized weights; ``base`` is always a layer of this format."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, name: str, base: LinearLayer) -> None:
        """Raise ValueError if the layer called ``name`` cannot be adapted in this state."""

    def original_dtype(self, base: LinearLayer) -> torch.dtype | None:
        """Return the dtype of the weight before quantization, or None if unknown."""
        return None

    def dequantize(self, base: LinearLayer) -> Tensor:
        """Return the weight (out, in), dequantized to a float dtype that the library chooses."""
        raise NotImplementedError

    def requantize(self, base: LinearLayer, weight: Tensor) -> Tensor | None:
        """Quantize ``weight`` (rows, in) like the base's weight, and dequantize it again.

        Return None if the format does not support it.
        """
        return None


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
                f"target_modules: {name!r} ({self.name}) has {in_features} inputs, expected a "
                f"multiple of its block size, {state.blocksize}: on a CPU bitsandbytes gives wrong "
                "values for others; do not quantize this layer, or use a GPU."
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

    def requantize(self, base: Any, weight: Tensor) -> Tensor:
        """See ``Format``."""
        own, functional = base.weight, _bitsandbytes().functional
        packed, state = functional.quantize_4bit(
            weight.contiguous(),
            blocksize=own.blocksize,
            compress_statistics=own.compress_statistics,
            quant_type=own.quant_type,
        )
        again: Tensor = functional.dequantize_4bit(packed, state)
        return again


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

    def requantize(self, base: LinearLayer, weight: Tensor) -> Tensor:
        """See ``Format``."""
        scales = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return torch.round(weight.float() / scales) * scales


def _raise_unquantized(name: str, fmt: str) -> NoReturn:
    raise ValueError(
        f"target_modules: {name!r} ({fmt}) is not quantized yet, which happens as it is moved to "
        "its device; call model.to(device) before patching."
    )


class TorchaoTensor(Format):
    """nn.Linear with a weight of one of torchao's tensor classes."""

    def dequantize(self, base: LinearLayer) -> Tensor:
        """Call the tensor's ``dequantize``, or read W from a product with an identity matrix."""
        try:
            return base.weight.dequantize()
        except (AttributeError, NotImplementedError):
            return _read_off(base)

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
    kinds = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", ())
    if isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), kinds):
        return TorchaoTensor(f"torchao {type(module.weight).__name__}")
    return None


def check_gradient(base: LinearLayer) -> None:
    """Raise RuntimeError if the format of ``base`` has no gradient for the input."""
    if (kind := type(base.weight).__name__) in _FORWARD_ONLY:
        raise RuntimeError(
            f"torchao {kind} gives no gradient to its input, so nothing below it can be trained; "
            "quantize with torchao's IntxWeightOnlyConfig(weight_dtype=torch.int4) to train, or "
            "call the model under torch.no_grad()."
        )


def _bitsandbytes() -> Any:
    """Return bitsandbytes if it is imported, else None."""
    return sys.modules.get("bitsandbytes")


def stored_bytes(weight: Tensor) -> int:
    """Return the bytes of a quantized weight, including scales and other tensors of the format."""
    names = getattr(type(weight), "tensor_data_names", None)
    if names is not None:
        optional = getattr(type(weight), "optional_tensor_data_names", ())
        parts = [getattr(weight, name, None) for name in (*names, *optional)]
    else:
        state = getattr(weight, "quant_state", None)
        nested = getattr(state, "state2", None)
        parts = [weight.data, getattr(weight, "SCB", None)]
        parts += [getattr(each, "absmax", None) for each in (state, nested)]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _read_off(base: LinearLayer) -> Tensor:
    """Read W (out, in) from the product of the layer with an identity matrix."""
    weight, columns = base.weight, []
    _, in_features = linear_shape(base)
    for begin in range(0, in_features, _READ_AT_ONCE):
        count = min(_READ_AT_ONCE, in_features - begin)
        ones = torch.zeros(count, in_features, dtype=weight.dtype, device=weight.device)
        ones[range(count), range(begin, begin + count)] = 1
        columns.append(nn.functional.linear(ones, weight).t())
    return torch.cat(columns, 1)


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


def check_not_repacked(modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a Linear4bit among a model's modules has rearranged the weight.

    See ``repacking_flags``. The library's inverse rounds the scales, so that it does not restore
    the weight exactly.
    """
    for name, module in modules.items():
        fmt, weight = format_of(module), getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if isinstance(fmt, BnbLinear4bit) and getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: {name!r} ({fmt.name}) has rearranged its weight for evaluation, as "
                "bitsandbytes does in a first forward without gradients on some CPUs, and gives no "
                "gradient to its input any more; load the model again and patch it before it is "
                "evaluated."
            )


def repacking_flags(model: nn.Module, hide_quantizer: bool) -> list[tuple[nn.Module, str, Any]]:
    """Return the attributes to change so that gradients pass quantized layers, adapted or not.

    On a CPU with AVX512-BF16, bitsandbytes' Linear4bit rearranges the weight in the first forward
    without grad in eval mode; from then on the input silently gets no gradient. With
    ``hide_quantizer`` the model does not report that it is quantized: transformers' Trainer would
    assume that it has no adapter.

    Returns:
        The module, the name and the new value of each attribute.
    """
    modules = list(model.modules())
    quantized = [module for module in modules if format_of(module) is not None]
    repacking = [module for module in quantized if getattr(module, _BNB_REPACK_FLAG, False)]
    changes: list[tuple[nn.Module, str, Any]] = [(m, _BNB_REPACK_FLAG, False) for m in repacking]
    if quantized and hide_quantizer:
        marked = (m for m in modules if m.__dict__.get("is_quantized", False))
        changes += [(module, "is_quantized", False) for module in marked]
    return changes
