"""A LoRA as one GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.checkpoint.card import write_card
from rasa_ext.checkpoint.lora_names import check_plain, pairs_of
from rasa_ext.checkpoint.writing import new_folder

GGUF = "adapter.gguf"

_FAMILIES = {
    # By model_type: (llama.cpp's architecture, whether q and k have their rows in another order).
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
"""Those whose linear layers the converter only renames, but for that order."""


def check_gguf(root: nn.Module, names: list[str], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError or ImportError where the adapter of a model cannot be such a file."""
    check_plain("gguf", "llama.cpp", root, saved, tuple(_FAMILIES))
    _names(root, names)


def write_gguf(
    directory: str | os.PathLike[str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str | None = None,
    *,
    root: nn.Module,
) -> None:
    """Write ``adapter.gguf`` and a ``card`` into a directory, or leave that as it was.

    It holds ``NAME.weight.lora_a`` (R, in) and ``NAME.weight.lora_b`` (out, R), float32, whose
    product llama.cpp scales by alpha / R, and rows of B in the order that the base's have there.
    """
    import gguf

    config: Any = root.config
    architecture, reordered = _FAMILIES[config.model_type]
    pairs = pairs_of(tensors)
    renamed = _names(root, list(pairs))
    heads = config.num_attention_heads
    with new_folder(Path(directory), "the adapter is whole", stale=()) as folder:
        writer = gguf.GGUFWriter(folder / GGUF, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
        for name, (A, B) in pairs.items():
            part = name.rpartition(".")[2]
            if reordered and part in ("q_proj", "k_proj"):
                B = _as_pairs(B, heads if part == "q_proj" else config.num_key_value_heads)
            for letter, tensor in (("a", A), ("b", B)):
                writer.add_tensor(
                    f"{renamed[name]}.weight.lora_{letter}", tensor.float().cpu().numpy()
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_card(folder, card, directory)


def _as_pairs(B: Tensor, heads: int) -> Tensor:
    """Move the rows of each head from halves, as transformers rotates them, to pairs (out, R)."""
    return torch.stack(B.unflatten(0, (heads, 2, -1)).unbind(1), 2).reshape(B.shape).contiguous()


def _names(root: nn.Module, names: list[str]) -> dict[str, str]:
    """Give llama.cpp's names of a model's layers; the table is the package gguf's."""
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "format: writing 'gguf' needs the package gguf: pip install gguf."
        ) from None
    config: Any = root.config
    architecture = _FAMILIES[config.model_type][0]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found = {name: table.get_name(name) for name in names}
    for name, its in found.items():
        if its is None:
            raise ValueError(
                f"format: expected layers that llama.cpp has a name for, but {name!r} is none of "
                f"its {architecture!r}; leave it out of target_modules, or save what "
                "rasa_ext.merge_and_unload(model) returns."
            )
    return found
