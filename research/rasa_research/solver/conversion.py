"""Compression of models and LoRAs, given by name, into RaSA adapters in a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor

from rasa_ext import Card
from rasa_ext.checkpoint import Lora, read_lora
from rasa_ext.commands.models import base_skeleton, load_model, load_skeleton
from rasa_ext.commands.parsing import check_differs
from rasa_research.solver.compress import CompressedAdapter, compress, nearest_to
from rasa_research.solver.fit import Solver
from rasa_research.solver.weights import ParameterWeights, SafetensorsFolder


def compress_finetuned(
    base: str,
    finetuned: str,
    output: Path,
    rank: int,
    k: int,
    *,
    target_modules: str | Sequence[str],
    modules_to_save: str | Sequence[str],
    solver: Solver,
    overwrite: bool = False,
) -> CompressedAdapter:
    """Write the RaSA adapter closest to a full fine-tuning of ``base``.

    Raises ValueError or FileNotFoundError if a model cannot be read, the two do not match, or
    ``output`` has files and ``overwrite`` is False; `WriteError` if it cannot be written.
    """
    check_differs((base, finetuned), output, overwrite=overwrite)
    model = load_skeleton(base)
    before, after = _weights(base, model), _weights(finetuned, model)

    options = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver)}
    found = compress(
        model,
        before,
        after,
        rank,
        k,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        **options,
    )
    if not (found.plan.modules_to_save or any(each.norm for each in found.groups.values())):
        raise ValueError(
            f"finetuned: expected layers that differ from those of {base}, but in {finetuned} no "
            "layer to adapt has changed, so the adapter would be zero."
        )
    told = _card(found, f"the full fine-tuning `{_local_name(finetuned)}`")
    found.save(model, output, card=told)
    return found


def compress_lora(
    lora: Path,
    output: Path,
    rank: int,
    k: int,
    *,
    base: str | None,
    solver: Solver,
    overwrite: bool = False,
) -> tuple[Lora, CompressedAdapter]:
    """Write the RaSA adapter closest to a LoRA.

    Raises ValueError or FileNotFoundError if the LoRA or the base's configuration cannot be read,
    or if they do not fit each other; for ``output``, like `compress_finetuned`.
    """
    check_differs((lora,), output, overwrite=overwrite)
    read = read_lora(lora)
    model = base_skeleton(lora, base)
    found = nearest_to(model, read, str(lora), rank, k, solver)
    name = f"the LoRA `{_local_name(str(lora))}` of rank {read.rank}"
    found.save(model, output, card=_card(found, name))
    return read, found


def _card(found: CompressedAdapter, source: str) -> Card:
    """Return a model card with the errors of an adapter; ``source`` is a noun for its origin."""
    rank = found.config.rank
    text = f"The adapter of this size closest to {source} that the solver found.\n\n"
    figures = {
        "error": f"{found.error:.4f}",
        f"smallest error of a LoRA of rank {rank}": f"{found.lora_error:.4f}",
        "smallest error of a LoRA with as many parameters": f"{found.lora_error_equal:.4f}",
    }
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    text += f"{table}\n\nErrors are ||dW - adapter||² / ||dW||², over all layers."
    if found.lost:
        text += (
            f" {found.residual_share:.2%} of the squared change is in parameters that are neither "
            "adapted nor saved in full, so it is missing."
        )
    return Card(sections={"Source": text})


def _local_name(source: str) -> str:
    """Return a public name for a source: of a local path, only the last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _weights(name: str, model: Any) -> Mapping[str, Tensor]:
    """Return a model's weights, one by one from safetensors files if the names match."""
    try:
        folder = Path(name).expanduser()
        if not folder.exists():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        stored = SafetensorsFolder(folder)
        ParameterWeights(model, stored, name)
    except (OSError, ValueError):  # .gguf, .bin, or names that transformers translates
        whole: Mapping[str, Tensor] = load_model(name).state_dict()
        return whole
    return stored
