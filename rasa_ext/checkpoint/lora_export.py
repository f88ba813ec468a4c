"""Writing a RaSA adapter as a plain LoRA, exactly: lora_A = Ap, lora_B = Bp^T, scale 1, rank R."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from rasa_ext.checkpoint.adapter import base_name, saved_tensors, task_type
from rasa_ext.checkpoint.files import PREFIX, write_adapter
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.patching.state import adapted_layers, patch_state, unwrap
from rasa_ext.patching.targets import suffixes


def export_lora(
    model: nn.Module, directory: str | os.PathLike[str], pad_to: int | None = None
) -> int:
    """Write the adapter as a LoRA that PEFT, vLLM, SGLang and llama.cpp read.

    Such readers know one rank and one scale, so every layer is written at the largest effective
    rank, or at ``pad_to``, filled up with zeros, and with a scale of 1. The LoRA's product is this
    adapter's, in float32.

    Returns:
        The rank that was written; a server's ``max_lora_rank`` must not be below it.

    Raises:
        TypeError, ValueError: ``pad_to`` is not an integer, or below the largest effective rank.
    """
    state, layers = patch_state(model), adapted_layers(model)
    rank = max(layer.effective_rank for _, layer in layers)
    if pad_to is not None:
        if isinstance(pad_to, bool) or not isinstance(pad_to, int):
            raise TypeError(f"pad_to: expected an integer or None, got {pad_to!r}.")
        if pad_to < rank:
            raise ValueError(f"pad_to: expected at least the effective rank {rank}, got {pad_to}.")
        rank = pad_to
    for message in _limits(model, layers, state.plan.modules_to_save):
        warnings.warn(message, stacklevel=2)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        Ap, Bp = layer.packed_factors()
        fill = rank - Ap.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(Ap, (0, 0, 0, fill))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(Bp.t(), (0, fill))
    for key, tensor in saved_tensors(unwrap(model), state.plan).items():
        tensors[f"{PREFIX}{key}"] = tensor
    settings = {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": suffixes([name for name, _ in layers], unwrap(model)),
        "modules_to_save": list(state.plan.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for _, layer in layers),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_adapter(directory, settings, tensors)
    return rank


_SGLANG_STACKED = (
    ("q_proj", "v_proj"),
    ("k_proj", "q_proj"),
    ("v_proj", "q_proj"),
    ("up_proj", "gate_proj"),
)
"""Layers that SGLang computes together, where it has no use for the first without the second."""


def _limits(
    model: nn.Module, layers: list[tuple[str, RasaLinear]], saved: tuple[str, ...]
) -> Iterator[str]:
    """What PEFT reads and some server does not, and what to do about it."""
    instead = "save what rasa_ext.merge_and_unload(model) returns"
    if any(layer.transposed for _, layer in layers):
        yield (
            "the model has Conv1D layers, whose LoRA PEFT reads but vLLM cannot serve; for vLLM, "
            f"{instead}."
        )
    if saved:
        yield (
            f"modules_to_save ({', '.join(saved)}) are written for PEFT, but servers refuse them; "
            f"for those, {instead}."
        )
    names = {name for name, _ in layers}
    modules = {name for name, _ in unwrap(model).named_modules()}
    for part, other in _SGLANG_STACKED:
        beside = {n: n[: -len(part)] + other for n in names if n.endswith(f".{part}")}
        alone = [name for name, its in beside.items() if its in modules and its not in names]
        if alone:
            yield (
                f"{part} is adapted without {other} in {len(alone)} layers. SGLang computes them "
                f"together and refuses such a LoRA, or leaves {part} out of it with no more than a "
                f"line in its log; for SGLang, adapt both, or {instead}."
            )
            break
    embeddings = {id(m.weight) for m in unwrap(model).modules() if isinstance(m, nn.Embedding)}
    tied = [name for name, layer in layers if id(layer.weight) in embeddings]
    if tied:
        yield (
            f"{tied[0]} is tied to the embedding, and llama.cpp refuses its LoRA; for llama.cpp, "
            "leave it out of target_modules, or untie the two and merge."
        )
