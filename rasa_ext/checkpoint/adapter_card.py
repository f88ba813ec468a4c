"""The card of an adapter in the package's own format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext._version import __version__
from rasa_ext.checkpoint.card import BASE_FOLDER, Base, Card, compose
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.patching.targets import Plan

TASKS = {"CAUSAL_LM": "text-generation"}
"""The Hub's words for PEFT's."""

_ROWS = 40
_ALWAYS = ("rank", "k", "alpha")


def adapter_card(
    model: nn.Module,
    settings: Mapping[str, Any],
    config: AdapterConfig,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    card: Card,
) -> str:
    """Give the text of a card. ``settings`` are those of the adapter's ``adapter_config.json``."""
    base, task = Base.of(settings["base_model_name_or_path"]), settings["task_type"]
    saved = ", ".join(f"`{name}`" for name in plan.modules_to_save)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    rows = {
        **about(base, config),
        "adapted": f"{sum(len(group.names) for group in plan.groups)} layers",
        "trained in full": saved,
        "trained rows": ", ".join(f"{len(t.ids)} of `{t.names[0]}`" for t in plan.tokens),
        "numbers in the file": f"{numbers:,}",
    }
    return compose(
        head_fields(base, task, card, "rasa_ext", [config.method, "lora"]),
        title(f"{config.title} adapter", base),
        f"Written by rasa_ext {__version__}.",
        rows,
        {
            "Load": load_text(model, base, task, "import rasa_ext", "rasa_ext.load_adapter"),
            "Serve": _serve(base, task),
            **card.sections,
            "Layers": _layers(config, plan),
        },
    )


def title(what: str, base: Base) -> str:
    """Give the heading of a card."""
    return f"{what} for {base.name.rpartition('/')[2]}" if base.name else what


def about(base: Base, config: AdapterConfig) -> dict[str, Any]:
    """Give the rows on the base, the method and its options."""
    link = f" ([arXiv {config.paper}](https://arxiv.org/abs/{config.paper}))"
    return {
        "base model": base.link() if base.name else "",
        "method": f"{config.title}{link if config.paper else ''}",
        **_options(config),
    }


def head_fields(
    base: Base, task: str | None, card: Card, library: str | None, tags: list[str]
) -> dict[str, Any]:
    """Give the head of the card of an adapter over a base; TypeError where ``card`` is none."""
    if not isinstance(card, Card):
        raise TypeError(f"card: expected a rasa_ext.Card or None, got {card!r}.")
    return {
        "base_model": base.id,
        "base_model_relation": "adapter" if base.id else None,
        "library_name": library,
        "pipeline_tag": TASKS.get(str(task)),
        "datasets": card.datasets,
        "tags": list(dict.fromkeys(tags)),
    }


def load_text(
    model: nn.Module, base: Base, task: str | None, imports: str, call: str, result: str = ""
) -> str:
    """Give the lines that load a directory's adapter into its base, run in that directory."""
    kind = "AutoModelForCausalLM" if task == "CAUSAL_LM" else type(model).__name__
    if not base.name or not type(model).__module__.startswith("transformers."):
        code = f'{imports}\n\n{result}{call}(model, ".")  # the base, as it was before training'
        return f"```python\n{code}\n```"
    code = f"{imports}\nfrom transformers import {kind}\n\n"
    code += f'model = {kind}.from_pretrained("{base.source}")\n{result}{call}(model, ".")'
    return f'{base.folder_note()}`"."` is the folder of this card.\n\n```python\n{code}\n```'


def _serve(base: Base, task: str | None) -> str:
    if not base.name or task != "CAUSAL_LM":
        return ""
    named = "" if base.id else f" --model {BASE_FOLDER}"
    return (
        "Servers read LoRAs. The first command writes this adapter as one, exactly, and prints the "
        "command that serves it; the second writes a model of its own, which is served as any "
        "other.\n\n```bash\n"
        f"rasa-ext export-lora . --output lora{named}\nrasa-ext merge . --output merged{named}\n"
        "```"
    )


def _options(config: AdapterConfig) -> dict[str, Any]:
    """Give a method's own options, those at their defaults left out, and dropout."""
    common = {field.name for field in dataclasses.fields(AdapterConfig)} - {"dropout"}
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in common and (field.name in _ALWAYS or value != field.default):
            text = str(value)
            found[field.name] = text if len(text) <= 80 else "see `adapter_config.json`"
    return found


def _layers(config: AdapterConfig, plan: Plan) -> str:
    """Give a table of the groups of layers, with their shapes and effective ranks."""
    lines = ["| layers | how many | out x in | rank of the change |", "| --- | --- | --- | --- |"]
    for group, ranks in zip(plan.groups[:_ROWS], _ranks(config, plan), strict=False):
        experts = f"{group.experts} x " if group.experts else ""
        shape = f"{experts}{group.shape[0]} x {group.shape[1]}"
        lines.append(f"| `{group.pattern}` | {len(group.names)} | {shape} | {ranks} |")
    if (more := len(plan.groups) - _ROWS) > 0:
        lines.append(f"| {more} more groups | | | |")
    return "\n".join(lines)


def _ranks(config: AdapterConfig, plan: Plan) -> Iterator[str]:
    """Give the effective rank of each group's layers, from shapes alone."""
    for group in plan.groups:
        places = group.places(torch.device("meta"))
        pool = config.pool(places)
        found = [config.factors(config.own(place), pool, place).rank for place in places]
        low, high = min(found), max(found)
        yield str(high) if low == high else f"{low} to {high}"
