"""File formats of a LoRA: for PEFT, for llama.cpp, for mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rasa_ext.checkpoint.files import CONFIG, PREFIX, write_files, write_json
from rasa_ext.checkpoint.lora_readers import GGUF, INSTEAD
from rasa_ext.checkpoint.lora_view import Export
from rasa_ext.methods.base import checked_choice
from rasa_ext.patching.tokens import ROWS

PEFT_FILES = "peft"
_FORMATS = (PEFT_FILES, "gguf", "mlx")
MLX = "adapters.safetensors"

_FAMILIES = {
    # By model_type: (llama.cpp's architecture, whether it reorders the rows of q and k).
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
}
"""Families whose linear layers llama.cpp's converter only renames, except for that order, and whose
layers have equal names in mlx-lm and transformers."""

_BLOCK = re.compile(r"^model\.layers\.\d+\.")

Pairs = dict[str, tuple[Tensor, Tensor]]
"""A (R, in) and B (out, R), float32, by the layer's name in the model."""


def check_format(format: str, export: Export) -> None:
    """Raise ValueError or ImportError, naming the argument, if the format cannot be written."""
    checked_choice("format", format, _FORMATS)
    if format != PEFT_FILES:
        _check_plain(format, export)
    if format == "gguf":
        _gguf_names(export.root, list(export.linears))


def _check_plain(format: str, export: Export) -> None:
    """Raise ValueError if a format that holds only low-rank pairs cannot hold the adapter."""
    kind = getattr(getattr(export.root, "config", None), "model_type", None)
    tied = export.tied_to_embedding()
    rows = [key.removesuffix(ROWS) for key in export.saved if key.endswith(ROWS)]
    problems = [
        *(f"{path} has adapted experts" for path in export.experts),
        *(f"trainable_token_indices has trained rows of {name}" for name in rows),
        *(f"{name} is tied to the embedding" for name in (tied,) if name),
        *(f"modules_to_save has trained {key}" for key in export.saved),
    ]
    if problems:
        raise ValueError(
            f"format: {format!r} holds only low-rank pairs of linear layers, but {problems[0]}; "
            f"{INSTEAD}, or write {PEFT_FILES!r}."
        )
    if kind not in _FAMILIES:
        raise ValueError(
            f"format: {format!r} supports the model types {', '.join(_FAMILIES)}, whose layer "
            f"names in its reader are known, got {kind!r}; {INSTEAD}, or write {PEFT_FILES!r}."
        )


def write_format(
    format: str,
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    root: nn.Module,
) -> None:
    """Write a LoRA of ``root``, given as PEFT's settings and tensors, in a format."""
    if format == PEFT_FILES:
        return write_files(folder, settings, tensors)
    A, B = ".lora_A.weight", ".lora_B.weight"
    names = [key.removesuffix(A) for key in tensors if key.endswith(A)]
    pairs = {
        name.removeprefix(PREFIX): (tensors[name + A].float(), tensors[name + B].float())
        for name in names
    }
    write = _write_gguf if format == "gguf" else _write_mlx
    return write(folder, settings, pairs, root)


def _write_gguf(folder: Path, settings: Mapping[str, Any], pairs: Pairs, root: Any) -> None:
    """Write ``adapter.gguf``, as llama.cpp's convert_lora_to_gguf.py does.

    It holds ``NAME.weight.lora_a`` (R, in) and ``NAME.weight.lora_b`` (out, R) in float32.
    llama.cpp scales the product by alpha / R. Rows of B are in the order of llama.cpp's base.
    """
    import gguf

    architecture, reordered = _FAMILIES[root.config.model_type]
    heads = root.config.num_attention_heads
    renamed = _gguf_names(root, list(pairs))
    writer = gguf.GGUFWriter(folder / GGUF, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for name, (A, B) in pairs.items():
        part = name.rpartition(".")[2]
        if reordered and part in ("q_proj", "k_proj"):
            B = _as_pairs(B, heads if part == "q_proj" else root.config.num_key_value_heads)
        for letter, tensor in (("a", A), ("b", B)):
            writer.add_tensor(
                f"{renamed[name]}.weight.lora_{letter}", tensor.cpu().contiguous().numpy()
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_pairs(B: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows of B (out, R) from halves, as in transformers, to pairs."""
    return torch.stack(B.unflatten(0, (heads, 2, -1)).unbind(1), 2).reshape(B.shape).contiguous()


def _gguf_names(root: Any, names: list[str]) -> dict[str, str]:
    """Return llama.cpp's names of a model's layers, from the table of the package gguf."""
    try:
        import gguf
    except ImportError:
        raise ImportError("format: 'gguf' needs the package gguf: pip install gguf.") from None
    architecture = _FAMILIES[root.config.model_type][0]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, root.config.num_hidden_layers)
    renamed = {name: table.get_name(name) for name in names}
    if missing := [name for name in names if renamed[name] is None]:
        raise ValueError(
            f"format: expected layers that llama.cpp has a name for, but its {architecture!r} has "
            f"none for {missing[0]!r}; leave the layer out of target_modules, or {INSTEAD}."
        )
    return renamed


def _write_mlx(folder: Path, settings: Mapping[str, Any], pairs: Pairs, root: Any) -> None:
    """Write both files that mlx-lm reads from ``--adapter-path``.

    mlx-lm computes y + scale (x lora_a) lora_b, so lora_a = A^T (in, R) and lora_b = B^T (R, out).
    Keys are names within a block, or whole names of layers outside the blocks.
    """
    tensors = {
        f"{name}.lora_{letter}": factor.cpu().t().contiguous()
        for name, (A, B) in pairs.items()
        for letter, factor in (("a", A), ("b", B))
    }
    config = {
        "fine_tune_type": "lora",
        "model": settings["base_model_name_or_path"],
        "num_layers": -1,
        "lora_parameters": {
            "rank": settings["r"],
            "scale": settings["lora_alpha"] / settings["r"],
            "dropout": 0.0,
            "keys": list(dict.fromkeys(_BLOCK.sub("", name) for name in pairs)),
        },
    }
    save_file(tensors, folder / MLX, metadata={"format": "mlx"})
    write_json(folder / CONFIG, config)
