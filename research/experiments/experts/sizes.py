"""Compute the size of an adapter of all experts in three public models.

    # prints the table of sizes in this folder's README.md; downloads nothing
    python -m research.experiments.experts.sizes

Each model is built on the meta device from a shape in this file, and patched like any other model.
The LoRA in the table is PEFT's, over ``target_parameters`` and with the same r. Attention has no
adapter in either. Files are float32, like the files of ``save_adapter`` and ``export_lora``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import rasa_ext


@dataclasses.dataclass(frozen=True)
class Shape:
    """The values of a published config that determine a model's experts, and an adapter rank."""

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    experts: int
    choices: int
    rank: int

    def config(self) -> Any:
        """Return the config of a model that is small except for the experts."""
        mixtral = self.model_type != "qwen3_moe"
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=128,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_experts_per_tok=self.choices,
            **{"num_local_experts" if mixtral else "num_experts": self.experts},
            **{"intermediate_size" if mixtral else "moe_intermediate_size": self.intermediate},
        )


SHAPES = {
    "Mixtral-8x7B": Shape("Mixtral-8x7B", "mixtral", 4096, 14336, 32, 8, 2, rank=4),
    "Qwen3-30B-A3B": Shape("Qwen3-30B-A3B", "qwen3_moe", 2048, 768, 48, 128, 8, rank=2),
    "gpt-oss-20b": Shape("gpt-oss-20b", "gpt_oss", 2880, 2880, 24, 32, 4, rank=4),
}
"""Config values of mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B and openai/gpt-oss-20b."""

WAYS = ("slot", "layer", "shared", "pool only")


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an adapter of all experts of a model."""

    way: str
    rank: int
    k: int
    R: int
    """Rank of the weight change of each expert."""
    trained: int
    written_out: int
    """Parameters of the equivalent LoRA, in which each expert has R private ranks."""


def size(shape: Shape, way: str, rank: int | None = None, k: int = 1) -> Size:
    """Count the parameters of an adapter with one grouping of the experts.

    "pool only" is "shared" with k = rank, both 1 by default. Raises ValueError if ``way`` is
    unknown.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}.")
    pool_only = way == "pool only"
    rank = (k if pool_only else shape.rank) if rank is None else rank
    model = rasa_ext.patch_model(
        meta_model(shape),
        rank=rank,
        k=rank if pool_only else k,
        target_modules=["gate_up_proj", "down_proj"],
        experts="shared" if pool_only else way,
    )
    found = rasa_ext.summary(model)
    (R,) = {row.R for row in found}
    written_out = sum(row.L * row.experts * row.R * sum(row.shape) for row in found)
    return Size(way, rank, rank if pool_only else k, R, found.adapter, written_out)


def lora_size(shape: Shape) -> Size:
    """Count the parameters of PEFT's LoRA over the same weights, with the same r."""
    from peft import LoraConfig, inject_adapter_in_model

    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=shape.rank, target_modules=[], target_parameters=names)
    model = inject_adapter_in_model(config, meta_model(shape))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Size("LoRA (PEFT)", shape.rank, 0, shape.rank, trained, trained)


def materialised(shape: Shape) -> int:
    """Return the bytes of a layer's expert weights in bfloat16, which W + dW would allocate."""
    one = shape.experts * shape.hidden * shape.intermediate
    return 2 * (2 * one + one)


def meta_model(shape: Shape) -> nn.Module:
    """Build the model with all layers on the meta device, without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape.config())


def table(shapes: dict[str, Shape] = SHAPES) -> Iterator[str]:
    """Yield the lines of a markdown table with a row for each model and way."""
    yield "| model | experts | r, k | R | trained | adapter's file | as a LoRA |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, shape in shapes.items():
        sizes = (lora_size(shape), *(size(shape, way) for way in WAYS))
        for each in sizes:
            bytes_of = (_bytes(4 * each.trained), _bytes(4 * each.written_out))
            ranks = f"{each.rank}, {each.k}" if each.k else str(each.rank)
            cells = (name, each.way, ranks, each.R, f"{each.trained / 1e6:.2f} M", *bytes_of)
            yield f"| {' | '.join(map(str, cells))} |"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main() -> None:
    """Print the table, and the memory of one layer's expert weights."""
    print("\n".join(table()))
    for name, shape in SHAPES.items():
        print(f"{name}: the experts of a layer take {materialised(shape) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
