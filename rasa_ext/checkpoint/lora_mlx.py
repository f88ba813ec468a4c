"""A LoRA as mlx-lm reads it from ``--adapter-path``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rasa_ext.checkpoint.card import write_card
from rasa_ext.checkpoint.files import CONFIG
from rasa_ext.checkpoint.lora_names import check_plain, pairs_of
from rasa_ext.checkpoint.writing import new_folder

MLX = "adapters.safetensors"

_FAMILIES = (
    "llama",
    "mistral",
    "smollm3",
    "granite",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
)
"""Model types whose layers have the same names in mlx-lm as in transformers."""

_BLOCK = re.compile(r"^model\.layers\.\d+\.")


def check_mlx(root: nn.Module, names: list[str], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError where mlx-lm would not read the adapter of a model, or only in part."""
    check_plain("mlx", "mlx-lm", root, saved, _FAMILIES)


def write_mlx(
    directory: str | os.PathLike[str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str | None = None,
    *,
    root: nn.Module,
) -> None:
    """Write both files and a ``card`` into a directory, or leave it as it was.

    mlx-lm computes y + scale (x lora_a) lora_b, so that lora_a = A^T (in, R), lora_b = B^T
    (R, out). Its keys are names within a block, or whole names of what is in none.
    """
    pairs = pairs_of(tensors)
    found = {}
    for name, (A, B) in pairs.items():
        found[f"{name}.lora_a"] = A.float().cpu().t().contiguous()
        found[f"{name}.lora_b"] = B.float().cpu().t().contiguous()
    keys = dict.fromkeys(_BLOCK.sub("", name) for name in pairs)
    config = {
        "fine_tune_type": "lora",
        "model": settings["base_model_name_or_path"],
        "num_layers": -1,
        "lora_parameters": {
            "rank": settings["r"],
            "scale": settings["lora_alpha"] / settings["r"],
            "dropout": 0.0,
            "keys": list(keys),
        },
    }
    with new_folder(Path(directory), "the adapter is whole", stale=()) as folder:
        save_file(found, folder / MLX, metadata={"format": "mlx"})
        text = json.dumps(config, indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        write_card(folder, card, directory)
