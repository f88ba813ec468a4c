"""The card of an adapter that was written as a plain LoRA."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rasa_ext._version import __version__
from rasa_ext.checkpoint.adapter_card import about, head_fields, load_text, title
from rasa_ext.checkpoint.card import Base, Card, compose
from rasa_ext.checkpoint.serving import serving_help
from rasa_ext.methods.base import AdapterConfig

_LIBRARIES = {"peft": "peft", "gguf": None, "mlx": "mlx"}


def lora_card(
    model: nn.Module,
    settings: Mapping[str, Any],
    config: AdapterConfig,
    card: Card,
    *,
    format: str,
    experts: str | None,
    exact: bool,
) -> str:
    """Give the text of a card. ``settings`` are PEFT's, ``experts`` the layout of adapted experts.

    ``exact`` says that no rank was left out.
    """
    base, task = Base.of(settings["base_model_name_or_path"]), settings["task_type"]
    tags = [config.method, "lora", *([] if format == "peft" else [format])]
    name = config.title
    how = "computes the same function" if exact else "is the nearest of its rank to every layer"
    own = about(base, config)
    tokens = settings.get("trainable_token_indices") or {}
    adapted = [*settings["target_modules"], *settings.get("target_parameters", ())]
    rows = {
        "base model": own.pop("base model"),
        "rank of the LoRA": settings["r"],
        "scale": 1,
        "written from": f"{own.pop('method')}, {', '.join(f'{k} {v}' for k, v in own.items())}",
        "adapted": ", ".join(f"`{each}`" for each in adapted),
        "trained in full": ", ".join(f"`{each}`" for each in settings["modules_to_save"] or ()),
        "trained rows": ", ".join(f"{len(ids)} of `{name}`" for name, ids in tokens.items()),
        "experts": f"layout `{experts}`" if experts else "",
    }
    load = ""
    if format == "peft" and experts in (None, "peft"):
        call = "PeftModel.from_pretrained"
        load = load_text(model, base, task, "from peft import PeftModel", call, "model = ")
    return compose(
        head_fields(base, task, card, _LIBRARIES[format], tags),
        title("LoRA", base),
        f"Written by rasa_ext {__version__} from an adapter of the method {name}. It {how}.",
        rows,
        {
            "Load": load,
            "Serve": _serve(model, base, task, settings["r"], format=format, experts=experts),
            **card.sections,
        },
    )


def _serve(
    model: Any, base: Base, task: str | None, rank: int, *, format: str, experts: str | None
) -> str:
    if not base.name or task != "CAUSAL_LM":
        return ""
    source = base.name if base.name.endswith(".gguf") else base.source
    float32 = getattr(model, "dtype", None) == torch.float32
    told = serving_help(source, Path(), rank, float32=float32, experts=experts, format=format)
    told = re.sub(r"(?m)^(?:  .+\n?)+", _fenced, f"{told}\n")
    return f"{base.folder_note()}Commands are for the folder of this card.\n\n{told}"


def _fenced(commands: re.Match[str]) -> str:
    return f"\n```bash\n{textwrap.dedent(commands[0])}```\n\n"
