"""Model cards: the README.md of a directory, whose head the Hub reads and whose text people do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"

BASE_FOLDER = "BASE_FOLDER"
"""Stands in a card, or a command, for the folder of a base that has no name on the Hub."""

_HEAD = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_SEAL = re.compile(r"\n<!-- Written by rasa_ext [^\n]*: ([0-9a-f]{64}) -->\n\Z")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")
_OWN = ("Load", "Serve", "Layers")
"""The sections that are written for a directory, whatever its card was told."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says beside what is read off the model: data, figures of a run, notes.

    ``save_adapter`` and ``export_lora`` write a README.md of base model, method, ranks and layers,
    and of how to load and serve the directory; this adds to it.

    Args:
        datasets: ids on the Hub, for the card's head.
        sections: Markdown by heading, in order.

    Raises:
        TypeError: ``datasets`` is no sequence of strings, or ``sections`` no mapping of them.

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
        """Check both."""
        names, texts = self.datasets, self.sections
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"datasets: expected a sequence of ids on the Hub, got {names!r}.")
        if not isinstance(texts, Mapping) or not all(isinstance(t, str) for t in texts.values()):
            raise TypeError(f"sections: expected a mapping of headings to text, got {texts!r}.")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Card:
        """Read what the card of a directory was told, so that another form of it says the same.

        Args:
            directory: of an adapter or a LoRA; empty if it has no card that this package began.

        Returns:
            The data sets of its head, and its sections but for "Load", "Serve" and "Layers".
        """
        text = _text(Path(directory) / CARD)
        if _SEAL.search(text) is None:
            return cls()
        text = _SEAL.sub("", text)
        front = _HEAD.match(text)
        head, body = (front[1], text[front.end() :]) if front else ("", text)
        listed = re.search(r"^datasets:\n((?:- .*\n)+)", head, re.MULTILINE)
        datasets = re.findall(r'^- "?(.*?)"?$', listed[1], re.MULTILINE) if listed else []
        _, *parts = re.split(r"^## (.+)\n", body, flags=re.MULTILINE)
        told = {
            heading: text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)
        }
        return cls(datasets, {name: text for name, text in told.items() if name not in _OWN})


PLAIN = Card()
"""Says no more than what is read off the model."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model as a card may name it: never by a path of the machine that wrote the card."""

    id: str | None
    """On the Hub."""
    name: str | None
    """The id, or the last part of a path."""

    @classmethod
    def of(cls, name_or_path: str | None) -> Base:
        """Look at what a model knows of where it came from."""
        if not name_or_path:
            return cls(None, None)
        found = hub_id(name_or_path)
        return cls(found, found or re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1])

    @property
    def source(self) -> str:
        """What ``from_pretrained`` is given."""
        return self.id or BASE_FOLDER

    def link(self) -> str:
        """Give it as Markdown."""
        return f"[{self.id}](https://huggingface.co/{self.id})" if self.id else f"`{self.name}`"

    def folder_note(self) -> str:
        """Say, where that is needed, what `BASE_FOLDER` stands for."""
        if self.id or not self.name:
            return ""
        what = "the folder of this base"
        if self.name.endswith(".gguf"):
            what = f"the folder of the model that `{self.name}` was made from"
        return f"`{BASE_FOLDER}` stands for {what}.\n"


def hub_id(name_or_path: str) -> str | None:
    """Give the id on the Hub that a model's name is, or None where it is a path of this machine."""
    if cached := _CACHED.search(name_or_path):
        return f"{cached[1]}/{cached[2]}"
    local = Path(name_or_path).exists() or name_or_path.endswith(".gguf")
    return None if local or not _ID.fullmatch(name_or_path) else name_or_path


def head(fields: Mapping[str, str | Sequence[str] | None]) -> str:
    """Give the YAML head of a card; fields of no value are left out.

    Strings are quoted as JSON has it, which YAML reads as they are, be they "no" or "1.0".
    """
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
        elif value:
            lines += [f"{name}:", *(f"- {json.dumps(v, ensure_ascii=False)}" for v in value)]
    return "\n".join([*lines, "---\n"])


def compose(
    fields: Mapping[str, str | Sequence[str] | None],
    title: str,
    intro: str,
    rows: Mapping[str, Any],
    sections: Mapping[str, str],
) -> str:
    """Put a card together; rows and sections of no content are left out."""
    table = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    parts = [f"# {title}", intro, "\n".join(["| | |", "| --- | --- |", *table])]
    parts += [f"## {name}\n\n{text.strip()}" for name, text in sections.items() if text.strip()]
    return sealed(head(fields) + "\n" + "\n\n".join(parts) + "\n")


def sealed(text: str) -> str:
    """Append the line by which an edited card is told from one as it was written."""
    return (
        f"{text}\n<!-- Written by rasa_ext and replaced by its next save, unless you edit it: "
        f"{_digest(text)} -->\n"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return ""


def is_edited(text: str) -> bool:
    """Tell whether a card is another than this package wrote; so is one that it did not write."""
    seal = _SEAL.search(text)
    return seal is None or seal[1] != _digest(_SEAL.sub("", text))


def card_file(directory: str | os.PathLike[str], card: str | None) -> dict[str, str]:
    """Give the card that a save is to write, by its file's name: none where one is to stay.

    A card that somebody edited stays, with a warning if it was written for something else. So does
    a README.md of any other origin.
    """
    path = Path(directory) / CARD
    if card is None:
        return {}
    if not os.path.lexists(path) or not is_edited(before := _text(path)):
        return {CARD: card}
    seal, fresh = _SEAL.search(before), _SEAL.search(card)
    if seal and fresh and seal[1] != fresh[1]:
        warnings.warn(
            f"{path}: left as it is, since it was edited after it was written, but what was saved "
            "now would have another card; edit it again, or delete it before the next save.",
            stacklevel=2,
        )
    return {}


def moved(text: str, repo_id: str, base_model: str | None, local: str | None) -> str:
    """Give a card as it reads in a repository of the Hub.

    The lines that load ``"."`` load the repository, and a base under another name, ``local`` or
    `BASE_FOLDER`, gets its id there. A card that was edited counts as edited.
    """
    edited = is_edited(text)
    seal = _SEAL.search(text)
    body = text[: seal.start()] if seal else text
    for call in ("(model, {})", "from_pretrained({})"):
        body = body.replace(call.format('"."'), call.format(f'"{repo_id}"'))
    body = re.sub(r"`\"\.\"` is the folder of this card\.\n\n", "", body)
    if base_model is not None:
        body = re.sub(rf"`{BASE_FOLDER}` stands for .*\n", "", body)
        body = body.replace(f" --model {BASE_FOLDER}", "").replace(BASE_FOLDER, base_model)
        row = rf"\g<1>{Base(base_model, base_model).link()}\g<2>"
        body = re.sub(r"(?m)^(\| base model \| )`.*`( \|)$", row, body)
        if local is not None and re.search(r"[/\\]", local):  # as PEFT's cards have it
            body = body.replace(local, base_model)
        front = _HEAD.match(body)
        if front and not re.search(r"^base_model:", front[1], re.MULTILINE):
            merged = 'library_name: "transformers"' in front[1]
            relation = "finetune" if merged else "adapter"
            fields = head({"base_model": base_model, "base_model_relation": relation})
            body = fields.removesuffix("---\n") + body.removeprefix("---\n")
    if edited:
        return body + (seal[0] if seal else "")
    return sealed(body)


def write_card(folder: Path, card: str | None, directory: str | os.PathLike[str]) -> None:
    """Write into ``folder``, whose files become those of ``directory``, as `card_file` has it."""
    for name, text in card_file(directory, card).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
