"""A tiny gpt-oss with MXFP4 experts, loaded as on a GPU with a stand-in for Triton's kernels."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations import hub_kernels, mxfp4
from transformers.quantizers import quantizer_mxfp4

EXPERTS, HIDDEN, INNER = 4, 96, 64
"""Rows of three (HIDDEN) and two (INNER) blocks of 32."""


class Rearranged:
    """A stand-in for a Triton layout: column order, reversed along the last dimension."""

    def swizzle_data(self, data: Tensor) -> Tensor:
        return data.flip(-1).transpose(-1, -2).contiguous()

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data.transpose(-1, -2).flip(-1)


class TritonTensor:
    """A stand-in for ``triton_kernels.tensor.Tensor``, which is not a torch.Tensor."""

    def __init__(self, data: Tensor, dtype: Any = None, layout: Any = None) -> None:
        self.storage = SimpleNamespace(data=data, layout=layout)
        self.dtype, self.shape = dtype, list(data.shape)

    @property
    def device(self) -> torch.device:
        return self.storage.data.device


def _converted(tensor: TritonTensor, layout: type[Rearranged]) -> TritonTensor:
    return TritonTensor(layout().swizzle_data(tensor.storage.data), tensor.dtype, layout())


STAND_IN = SimpleNamespace(
    tensor=SimpleNamespace(FP4="fp4", convert_layout=_converted, wrap_torch_tensor=TritonTensor),
    tensor_details=SimpleNamespace(
        layout=SimpleNamespace(
            StridedLayout=Rearranged,
            make_default_matmul_mxfp4_w_layout=lambda mx_axis: (Rearranged, {}),
        )
    ),
    matmul_ogs=SimpleNamespace(
        PrecisionConfig=SimpleNamespace, FlexCtx=SimpleNamespace, InFlexData=SimpleNamespace
    ),
)
"""The parts of the kernels package that transformers uses to load a model."""


@contextlib.contextmanager
def as_on_a_gpu(kernels: Any) -> Iterator[None]:
    """Make transformers load MXFP4 experts packed, in the layout of ``kernels``."""
    quantizer = quantizer_mxfp4.Mxfp4HfQuantizer
    with (
        mock.patch.object(quantizer, "validate_environment"),
        mock.patch.object(
            quantizer_mxfp4, "get_current_accelerator", return_value=torch.device("cuda")
        ),
        # A CUDA build would move weights to the GPU, which there need not be.
        mock.patch.object(mxfp4, "get_current_accelerator", return_value=None),
        mock.patch.object(hub_kernels, "get_kernel", return_value=kernels),
    ):
        yield


def write_gpt_oss(folder: Path) -> Path:
    """Write a tiny gpt-oss checkpoint with random MXFP4 experts."""
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, out = tensor.shape
            shape = experts, out, width // 32
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(119, 123, shape, dtype=torch.uint8)
        else:
            tensors[name] = tensor.contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    return folder


def packed(folder: Path, kernels: Any = STAND_IN, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the model with packed experts."""
    with as_on_a_gpu(kernels):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def dense(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the model dequantized by transformers."""
    config = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, experts_implementation="eager"
    )
    return model.requires_grad_(False)
