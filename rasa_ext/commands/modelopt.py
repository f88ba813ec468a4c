"""Checkpoints of NVIDIA's ModelOpt in FP8 and NVFP4, which transformers does not read.

Importing this module registers them with transformers.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from rasa_ext.base_layers.experts import is_experts
from rasa_ext.base_layers.layouts import layout_of, tiled_linear

_FP8 = torch.float8_e4m3fn


class ModelOptLinear(nn.Linear):
    """A linear layer with the tensors that ModelOpt stores; inputs are not rounded."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``x W^T + bias``."""
        layout = layout_of(self)
        assert layout is not None
        return tiled_linear(layout, self, input)


class ModelOptConfig(QuantizationConfigMixin):
    """The part of a checkpoint's settings that says how weights are stored."""

    def __init__(self, quant_algo: str = "", ignore: tuple[str, ...] = (), **_: Any) -> None:
        self.quant_method, self.quant_algo, self.ignore = "modelopt", quant_algo, ignore


class ModelOptQuantizer(HfQuantizer):
    """Gives a model's linear layers the tensors that ModelOpt stores."""

    requires_calibration = is_trainable = True
    is_qat_trainable = True  # else Trainer refuses to evaluate a model without an adapter
    is_serializable = False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        given: Any = self.quantization_config
        for name, module in list(model.named_modules()):
            if is_experts(module):
                raise ValueError("stacked experts that ModelOpt quantized are not read")
            if type(module) is nn.Linear and not any(
                fnmatch.fnmatch(name, pattern) for pattern in given.ignore
            ):
                module.__class__ = ModelOptLinear
                for key, (shape, dtype) in _stored(given.quant_algo, *module.weight.shape).items():
                    empty = torch.empty(shape, dtype=dtype, device="meta")
                    module.register_parameter(key, nn.Parameter(empty, requires_grad=False))


def _stored(algo: str, out: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of the tensors of a weight (out, width)."""
    single = (), torch.float32
    if algo == "FP8":
        return {"weight": ((out, width), _FP8), "weight_scale": single}
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return {"weight": ((out, width), _FP8), "weight_scale": ((out,), torch.float32)}
    if algo == "NVFP4":
        codes, scales = ((out, width // 2), torch.uint8), ((out, width // 16), _FP8)
        return {"weight": codes, "weight_scale": scales, "weight_scale_2": single}
    raise ValueError(f"ModelOpt's quant_algo {algo!r} is not read, expected FP8 or NVFP4")


if "modelopt" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("modelopt")(ModelOptConfig)
    register_quantizer("modelopt")(ModelOptQuantizer)
