"""From models and LoRAs by name to RaSA adapters in a directory, without loading the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor

from rasa_ext.checkpoint.lora import Lora, read_lora
from rasa_ext.solver.compress import CompressedAdapter, compress
from rasa_ext.solver.fit import Solver
from rasa_ext.solver.import_lora import convert_lora
from rasa_ext.solver.weights import ParameterWeights, SafetensorsFolder
from rasa_ext.train.card import compressed_card, local_name
from rasa_ext.train.model_loading import base_of, load_model, load_skeleton, naming_the_base
from rasa_ext.train.options import check_differs


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
    """Write the RaSA adapter that comes closest to a full fine-tuning of ``base``.

    Raises ValueError or FileNotFoundError where a model cannot be read or the two do not match, or
    ``output`` holds files and ``overwrite`` was not asked for; `WriteError` where it cannot be
    written.
    """
    check_differs((base, finetuned), output, overwrite=overwrite)
    model = _skeleton(base)
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
            f"finetuned: expected layers that differ from those of {base}, but in {finetuned} none "
            "of those to adapt does, so that the adapter would be all zeros."
        )
    told = compressed_card(found, f"the full fine-tuning `{local_name(finetuned)}`")
    found.save(model, output, card=told)
    return found


def compress_lora(
    lora: Path,
    output: Path,
    rank: int | None,
    k: int,
    *,
    base: str | None,
    solver: Solver,
    overwrite: bool = False,
) -> tuple[Lora, CompressedAdapter]:
    """Write a LoRA as a RaSA adapter: exactly without rank and k, else the nearest one.

    Raises ValueError or FileNotFoundError where the LoRA or its base's configuration cannot be
    read, or do not fit each other; for ``output`` as `compress_finetuned`.
    """
    check_differs((lora,), output, overwrite=overwrite)
    read = read_lora(lora)
    with naming_the_base(lora, base):
        model = _skeleton(base_of(lora, base))
    found = convert_lora(model, read, str(lora), rank, k, solver)
    name = f"the LoRA `{local_name(str(lora))}` of rank {read.rank}"
    found.save(model, output, card=compressed_card(found, name))
    return read, found


def _skeleton(name: str) -> Any:
    model = load_skeleton(name)
    model.config._name_or_path = name
    return model


def _weights(name: str, model: Any) -> Mapping[str, Tensor]:
    """A model's weights, from its safetensors files one by one if they have the model's names."""
    try:
        folder = Path(name).expanduser()
        if not folder.exists():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        stored = SafetensorsFolder(folder)
        ParameterWeights(model, stored, name)
    except (OSError, ValueError):  # .gguf, .bin, or names that transformers translates
        return load_model(name).state_dict()
    return stored
