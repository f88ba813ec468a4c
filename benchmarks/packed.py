"""Packed bases: a training step by tiles, against dequantizing whole layers and a dense base.

    python -m benchmarks.packed [--presets W4A16 FP8_DYNAMIC ...] [--layers 4] [--rounds 7]

SmolLM2-135M's shapes with random weights in bfloat16, in schemes of compressed-tensors; batch 2 x
160 tokens, forward and backward, r=8, k=1 over all linear layers. "whole" dequantizes each weight
at once, in forward and backward; this takes the memory of a layer instead of a tile. Needs
``pip install compressed-tensors``.
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

PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A16", "W4A16", "MXFP4A16", "NVFP4A16")


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
    given = parser.parse_args()
    harness.pin_allocator()
    print(f"{harness.machine()}; bfloat16, {given.layers} layers, ratios of seconds a step")
    print("preset         tiles / whole  quartiles      tiles / dense  quartiles")
    base, tokens, tile = base_model(given.layers), torch.randint(320, (2, 160)), layouts._TILE
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
