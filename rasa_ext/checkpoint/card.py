"""Model cards: the README.md of a directory, with a head for the Hub and text for people."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rasa_ext._version import __version__
from rasa_ext.checkpoint.lora_readers import BASE_FOLDER, VLLM_RANKS, serving_help
from rasa_ext.checkpoint.lora_view import Export
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.patching.grouping import shape_text
from rasa_ext.patching.targets import Plan

CARD = "README.md"

CARD_LINE = "PEFT reads this adapter after `import rasa_ext.peft`, of the package `rasa-ext`."
_SEAL = re.compile(r"\n<!-- Written by rasa_ext [^\n]*: ([0-9a-f]{64}) -->\n\Z")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
_QUANTIZED = re.compile(r"\bI?Q\d\w*|\bB?F(16|32)\b", re.IGNORECASE)
_OWN = ("Load", "Serve", "Layers")
"""Sections that are written for each directory, whatever the card was given."""
_HERE = '`"."` is the folder of this card.\n\n'
_ROWS = 40
"""Largest number of layer groups that a card lists."""
_LARGEST = 1 << 18
"""Largest size in bytes of a card whose additions are read."""
_ALWAYS = ("rank", "k", "alpha")
_LIBRARIES = {"peft": "peft", "gguf": None, "mlx": "mlx"}


@dataclasses.dataclass(frozen=True)
class Card:
    """Additions to a model card: data sets, figures of a run, notes.

    ``save_adapter`` and ``export_lora`` write a README.md with base model, method, ranks, layers,
    and how to load and serve the directory. This adds to it.

    Args:
        datasets: ids on the Hub, for the card's head.
        sections: Markdown by heading, in order.

    Raises:
        TypeError: ``datasets`` is no sequence of strings, or ``sections`` no mapping of strings.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> card = rasa_ext.Card(sections={"Training": "100 steps, loss 2.31 -> 0.84."})
        >>> rasa_ext.save_adapter(model, "adapter", card=card)
        >>> rasa_ext.export_lora(model, "lora", card=rasa_ext.Card.read("adapter"))
        9
    """

    datasets: Sequence[str] = ()
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check both fields."""
        names, texts = self.datasets, self.sections
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"datasets: expected a sequence of ids on the Hub, got {names!r}.")
        if not isinstance(texts, Mapping) or not all(isinstance(t, str) for t in texts.values()):
            raise TypeError(f"sections: expected a mapping of headings to text, got {texts!r}.")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Card:
        """Read the additions of a directory's card, to use them in another card.

        Args:
            directory: directory of an adapter or a LoRA.

        Returns:
            The data sets of the head, and the sections except "Load", "Serve" and "Layers". Empty
            if the directory has no card of this package, or one of more than 256 KiB.

        Raises:
            ValueError: the head of the card is no YAML.
        """
        path = Path(directory) / CARD
        text, seal = _split(_text(path))
        if not seal:
            return cls()
        card = _parsed(text, str(path))
        _, *parts = re.split(r"^## (.+)\n", card.text, flags=re.MULTILINE)
        sections = dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
        return cls(
            card.data.get("datasets", ()),
            {name: text for name, text in sections.items() if name not in _OWN},
        )


PLAIN = Card()
"""A card without additions."""


@dataclasses.dataclass(frozen=True)
class BaseName:
    """A base model as a card may name it: without paths of this machine."""

    id: str | None
    """Id on the Hub."""
    name: str | None
    """The id, or the last part of a path."""

    @classmethod
    def of(cls, name_or_path: str | None) -> BaseName:
        """Return the base for the name or path that a model states."""
        if not name_or_path:
            return cls(None, None)
        hub_name = hub_id(name_or_path)
        return cls(hub_name, hub_name or re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1])

    @property
    def source(self) -> str:
        """Return the argument for ``from_pretrained``."""
        return self.id or BASE_FOLDER

    @property
    def gguf(self) -> str:
        """Return the name of a .gguf file, or ""."""
        return self.name if self.name and self.name.endswith(".gguf") else ""

    def link(self) -> str:
        """Return the name as a Markdown link."""
        return f"[{self.id}](https://huggingface.co/{self.id})" if self.id else f"`{self.name}`"

    def folder_note(self) -> str:
        """Return a note on `BASE_FOLDER`, if the card uses it."""
        if self.id or not self.name:
            return ""
        if not self.gguf:
            return f"`{BASE_FOLDER}` is the folder of this base.\n"
        kind = _QUANTIZED.search(self.name)
        weights = f"its {kind[0] if kind else 'quantized'} weights, dequantized"
        return f"`{BASE_FOLDER}` is this file's folder. The adapter was trained on {weights}.\n"


def hub_id(name_or_path: str) -> str | None:
    """Return a model's name as an id on the Hub, or None if it is a path of this machine."""
    if cached := _CACHED.search(name_or_path):
        return f"{cached[1]}/{cached[2]}"
    local = Path(name_or_path).exists() or name_or_path.endswith(".gguf")
    return None if local or not _ID.fullmatch(name_or_path) else name_or_path


def adapter_card(
    model: nn.Module,
    settings: Mapping[str, Any],
    plan: Plan,
    tensors: Mapping[str, Tensor],
    card: Card,
) -> str:
    """Return the card of an adapter in the package's format; ``settings`` are its config."""
    base, task = BaseName.of(settings["base_model_name_or_path"]), settings["task_type"]
    serve = ""
    if base.name and task == "CAUSAL_LM":
        named = "" if base.id else f" --model {BASE_FOLDER}{base.gguf and f'/{base.gguf}'}"
        serve = (
            "Servers read LoRAs. The first command exports this adapter as an exact LoRA, and "
            "prints the command that serves it. The second writes a merged model, which is served "
            f"like any model.\n\n```bash\nrasa-ext export-lora . --output lora{named}\n"
            f"rasa-ext merge . --output merged{named}\n```"
        )
        if limit := _slot(plan):
            float32 = " --dtype float32" if getattr(model, "dtype", None) == torch.float32 else ""
            serve += (
                "\n\nvLLM with the package `rasa-ext` serves this very folder:\n\n```bash\n"
                f"RASA_EXT_VLLM_POOLS=shared vllm serve {base.source}{float32} --enable-lora "
                f"--max-lora-rank {limit} --max-loras 2 --lora-modules rasa=.\n```"
            )
    return compose(
        head_fields(base, task, card, "rasa_ext", [plan.config.method, "lora"]),
        title(f"{plan.config.title} adapter", base),
        f"Written by rasa_ext {__version__}. {CARD_LINE}",
        {
            **about(base, plan.config),
            "adapted": f"{sum(len(group.names) for group in plan.groups)} layers",
            **_trained(plan),
            "numbers in the file": f"{sum(t.numel() for t in tensors.values()):,}",
        },
        {
            "Load": _load(model, base, task, "import rasa_ext", "rasa_ext.load_adapter"),
            "Serve": serve,
            **card.sections,
            "Layers": _layers(plan),
        },
    )


def _slot(plan: Plan) -> int:
    """Return vLLM's slot for an adapter of linear layers; 0 if it cannot serve the folder."""
    ranks = [getattr(plan.config, "rank", 0)]
    ranks += [rank for _, rank in getattr(plan.config, "rank_pattern", ())]
    served = not (plan.modules_to_save or plan.tokens or any(g.experts for g in plan.groups))
    return next((slot for slot in VLLM_RANKS if slot >= max(ranks)), 0) if served else 0


def lora_card(
    export: Export,
    settings: Mapping[str, Any],
    card: Card,
    format: str,
    layout: str | None,
    exact: bool,
) -> str:
    """Return the card of a LoRA with PEFT's ``settings``; ``layout`` is for adapted experts.

    ``exact`` states that no rank was left out.
    """
    model, config, task = export.root, export.config, export.task_type
    base = BaseName.of(settings["base_model_name_or_path"])
    tags = [config.method, "lora", *([] if format == "peft" else [format])]
    how = (
        "computes the same function"
        if exact
        else "approximates every layer as well as its rank allows"
    )
    adapted = [*settings["target_modules"], *settings.get("target_parameters", ())]
    load = serve = ""
    if format == "peft" and layout in (None, "peft"):
        call = "PeftModel.from_pretrained"
        load = _load(model, base, task, "from peft import PeftModel", call, "model = ")
    if base.name and task == "CAUSAL_LM":
        source = base.gguf or base.source
        float32 = getattr(model, "dtype", None) == torch.float32
        text, *commands = serving_help(
            source, Path(), settings["r"], float32=float32, expert_layout=layout, format=format
        ).split("\n  ")
        serve = f"{base.folder_note()}Run the commands in the folder of this card.\n\n{text}\n"
        serve += "\n```bash\n" + "\n".join(commands) + "\n```" if commands else ""
    return compose(
        head_fields(base, task, card, _LIBRARIES[format], tags),
        title("LoRA", base),
        f"Written by rasa_ext {__version__} from an adapter of method {config.title}. It {how}.",
        {
            **about(base, config),
            "rank of the LoRA": f"{settings['r']}, with scale 1",
            "adapted": ", ".join(f"`{layer}`" for layer in adapted),
            **_trained(export),
            "experts": f"layout `{layout}`" if layout else "",
        },
        {"Load": load, "Serve": serve, **card.sections},
    )


def _trained(adapted: Plan | Export) -> dict[str, str]:
    """Return the rows on what is trained besides adapters."""
    return {
        "trained in full": ", ".join(f"`{name}`" for name in adapted.modules_to_save),
        "trained rows": ", ".join(f"{len(t.ids)} of `{t.names[0]}`" for t in adapted.tokens),
    }


def title(what: str, base: BaseName) -> str:
    """Return the heading of a card."""
    return f"{what} for {base.name.rpartition('/')[2]}" if base.name else what


def about(base: BaseName, config: AdapterConfig) -> dict[str, Any]:
    """Return the rows on the base, the method and the options that differ from the defaults."""
    link = f" ([arXiv {config.paper}](https://arxiv.org/abs/{config.paper}))"
    common = {field.name for field in dataclasses.fields(AdapterConfig)} - {"dropout"}
    rows = {
        "base model": base.link() if base.name else "",
        "method": f"{config.title}{link if config.paper else ''}",
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in common and (field.name in _ALWAYS or value != field.default):
            long = len(str(value)) > 80
            rows[field.name] = "see `adapter_config.json`" if long else str(value)
    return rows


def head_fields(
    base: BaseName, task: str | None, card: Card, library: str | None, tags: list[str]
) -> dict[str, Any]:
    """Return the head of an adapter's card; raise TypeError if ``card`` is not a Card."""
    if not isinstance(card, Card):
        raise TypeError(f"card: expected a rasa_ext.Card or None, got {card!r}.")
    return {
        "base_model": base.id,
        "base_model_relation": "adapter" if base.id else None,
        "library_name": library,
        "pipeline_tag": "text-generation" if task == "CAUSAL_LM" else None,
        "datasets": list(card.datasets) or None,
        "tags": tags,
    }


def _load(
    model: nn.Module, base: BaseName, task: str | None, imports: str, call: str, result: str = ""
) -> str:
    """Return code that loads a directory's adapter, to be run in that directory."""
    kind = "AutoModelForCausalLM" if task == "CAUSAL_LM" else type(model).__name__
    if not base.name or not type(model).__module__.startswith("transformers."):
        code = f'{imports}\n\n{result}{call}(model, ".")  # the base, as before training'
        return f"```python\n{code}\n```"
    file = base.gguf and f', gguf_file="{base.gguf}"'
    if kind.endswith("Classification"):  # a new head has two labels, if none are named
        file += f", num_labels={cast(Any, model.config).num_labels}"
    code = f"{imports}\nfrom transformers import {kind}\n\n"
    code += f'model = {kind}.from_pretrained("{base.source}"{file})\n{result}{call}(model, ".")'
    return f"{base.folder_note()}{_HERE}```python\n{code}\n```"


def _layers(plan: Plan) -> str:
    """Return a table of the layer groups, with shapes and effective ranks."""
    lines = ["| layers | how many | out x in | rank of the change |", "| --- | --- | --- | --- |"]
    for group in plan.groups[:_ROWS]:
        ranks_of = [adapter.factors().rank for adapter in group.planned(plan.config).values()]
        ranks = " to ".join(map(str, sorted({min(ranks_of), max(ranks_of)})))
        shape = shape_text(group.shape, group.experts)
        lines.append(f"| `{group.pattern}` | {len(group.names)} | {shape} | {ranks} |")
    if (more := len(plan.groups) - _ROWS) > 0:
        lines.append(f"| {more} more groups | | | |")
    return "\n".join(lines)


def compose(
    fields: Mapping[str, Any],
    title: str,
    intro: str,
    rows: Mapping[str, Any],
    sections: Mapping[str, str],
) -> str:
    """Compose a card; fields, rows and sections without content are left out."""
    from huggingface_hub import ModelCardData

    table = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    parts = [f"# {title}", intro, "\n".join(["| | |", "| --- | --- |", *table])]
    parts += [f"## {name}\n\n{text.strip()}" for name, text in sections.items() if text.strip()]
    return _sealed(f"---\n{ModelCardData(**fields)}\n---\n\n" + "\n\n".join(parts) + "\n")


def card_for_hub(text: str, repo_id: str, base_model: str | None, local: str | None) -> str:
    """Return a card changed for a repository of the Hub.

    Lines that load ``"."`` load the repository instead. A base named ``local`` or `BASE_FOLDER` is
    replaced by the id. An edited card still counts as edited.
    """
    body, seal = _split(text)
    edited = text != _sealed(body)
    for call in ("(model, {})", "from_pretrained({})"):
        body = body.replace(call.format('"."'), call.format(f'"{repo_id}"'))
    body = body.replace(_HERE, "")
    if base_model is not None:
        body = re.sub(rf"`{BASE_FOLDER}` .*\n", "", body)
        body = re.sub(rf" --model {BASE_FOLDER}\S*", "", body).replace(BASE_FOLDER, base_model)
        row = rf"\g<1>{BaseName(base_model, base_model).link()}\g<2>"
        body = re.sub(r"(?m)^(\| base model \| )`.*`( \|)$", row, body)
        if local is not None and re.search(r"[/\\]", local):  # as PEFT's cards have it
            body = body.replace(local, base_model)
        if body.startswith("---\n"):
            card = _parsed(body, CARD)
            merged = card.data.get("library_name") == "transformers"
            card.data["base_model"] = base_model
            card.data["base_model_relation"] = "finetune" if merged else "adapter"
            body = str(card)
    return body + seal if edited else _sealed(body)


def _parsed(text: str, where: str) -> Any:
    """Return the head as ``data``, and ``text``; raise ValueError if the head is no YAML."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard(text)
    except (YAMLError, ValueError) as error:
        raise ValueError(f"{where}: expected a YAML header that parses: {error}.") from None


def write_card(folder: Path, card: str | None, directory: str | os.PathLike[str]) -> None:
    """Write a card into ``folder``, whose files replace files of ``directory``.

    An edited card in ``directory`` stays, with a warning if it was written for something else. A
    README.md that is not from this package stays too.
    """
    if card is None:
        return
    path = Path(directory) / CARD
    before = _text(path)
    body, seal = _split(before)
    if not os.path.lexists(path) or before == _sealed(body):
        (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    elif seal not in ("", _split(card)[1]):
        warnings.warn(
            f"{path}: left unchanged, since it was edited after it was written, but the card of "
            "what was saved now differs; edit it again, or delete it before the next save.",
            stacklevel=2,
        )


def _sealed(text: str) -> str:
    """Append the seal: a line that shows later whether the card was edited."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (
        f"{text}\n<!-- Written by rasa_ext and replaced by its next save, unless you edit it: "
        f"{digest} -->\n"
    )


def _split(text: str) -> tuple[str, str]:
    """Split a card into the text and the seal, which is empty if missing."""
    seal = _SEAL.search(text)
    return (text[: seal.start()], seal[0]) if seal else (text, "")


def _text(path: Path) -> str:
    """Return the text of a card; "" if there is none, or it is too large to read in seconds."""
    try:
        small = path.is_file() and path.stat().st_size <= _LARGEST
        return path.read_bytes().decode() if small else ""
    except (OSError, UnicodeDecodeError):
        return ""
