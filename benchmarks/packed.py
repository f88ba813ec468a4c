"""Packed bases: a training step by tiles, against dequantizing whole layers and a dense base.

    python -m benchmarks.packed [--presets W4A16 GPTQ ...] [--layers 4] [--rounds 7] [--tokens 160]

SmolLM2-135M's shapes with random weights in bfloat16, in schemes of compressed-tensors and in
GPTQ's layout; batch 2 x 160 tokens, forward and backward, r=8, k=1 over all linear layers. "whole"
dequantizes each weight at once, in forward and backward; this takes the memory of a layer instead
of a tile. Needs ``pip install compressed-tensors``.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rasa_ext
from benchmarks import harness
from rasa_ext.base_layers import layouts

PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A16", "W4A16", "MXFP4A16", "NVFP4A16", "GPTQ")


class TorchLinear(nn.Module):
    """A layer with the names of gptqmodel's, in 4 bits, and random words."""

    bits, bias = 4, None

    def __init__(self, out_features: int, in_features: int, group: int = 64) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        for name, shape in {
            "qweight": (in_features // 8, out_features),
            "qzeros": (in_features // group, out_features // 8),
        }.items():
            self.register_buffer(name, torch.randint(-(2**31), 2**31, shape, dtype=torch.int32))
        self.register_buffer("scales", torch.full((in_features // group, out_features), 2**-10))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // group)


def base_model(layers: int) -> nn.Module:
    """Return a model with SmolLM2's shapes and a small vocabulary."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).bfloat16().requires_grad_(False)


def packed(model: nn.Module, preset: str) -> nn.Module:
    """Quantize the model by a preset, with equal scales: the values do not change the time."""
    if preset == "GPTQ":
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.set_submodule(name, TorchLinear(*module.weight.shape).bfloat16())
        return model
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size == 128:  # 576 is no multiple of 128
        scheme.weights.group_size = 64
    if scheme.weights.block_structure is not None:
        scheme.weights.block_structure = [64, 64]
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    )
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(2**-6)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=160)
    given = parser.parse_args()
    harness.pin_allocator()
    size = f"{given.layers} layers, 2 x {given.tokens} tokens"
    print(f"{harness.machine()}; bfloat16, {size}, ratios of seconds a step")
    print("preset         tiles / whole  quartiles      tiles / dense  quartiles")
    base, tokens, tile = (
        base_model(given.layers),
        torch.randint(320, (2, given.tokens)),
        layouts._TILE,
    )
    dense = rasa_ext.patch_model(copy.deepcopy(base), 8, 1).train()
    for preset in given.presets:
        model = rasa_ext.patch_model(packed(copy.deepcopy(base), preset), 8, 1).train()

        def step(model: nn.Module, size: int) -> None:
            layouts._TILE = size
            model(input_ids=tokens, labels=tokens).loss.backward()

        variants = {
            "tiles": lambda model=model: step(model, tile),
            "whole": lambda model=model: step(model, 1 << 40),
            "dense": lambda: step(dense, tile),
        }
        seconds = harness.interleaved(variants, given.rounds, warmup=1)
        line = f"{preset:14}"
        for other in ("whole", "dense"):
            ratios = [a / b for a, b in zip(seconds["tiles"], seconds[other], strict=True)]
            low, middle, high = harness.quartiles(ratios)
            line += f"{middle:14.2f}  {low:.2f} to {high:.2f}"
        print(f"{line}   ({statistics.median(seconds['dense']):.2f} s dense)", flush=True)


if __name__ == "__main__":
    main()
