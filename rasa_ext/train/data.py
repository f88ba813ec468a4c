"""Training data: reading and checking JSON lines.

A line is either ``{"prompt": str, "completion": str}``, which is used as it stands, or
``{"messages": [{"role": ..., "content": ...}, ...]}``, which goes through the tokenizer's chat
template.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPECTED = (
    "an object with the strings 'prompt' and 'completion', or with 'messages', a list of "
    "{'role': ..., 'content': ...}"
)
ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """Data that cannot be used; the message says where it is and what was expected."""


@dataclass(frozen=True)
class Example:
    """One checked line. Either both ``prompt`` and ``completion`` are set, or ``messages``."""

    where: str
    """The file and line it came from, for errors."""
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


def read_examples(source: str) -> list[Example]:
    """Examples of a JSONL file, or of a hub data set's split ``train``.

    Raises DataError naming the line and what was expected there; for a name that is neither a
    file nor loadable, what to do.
    """
    path = Path(source)
    if path.is_file():
        return _read_jsonl(path)
    if path.is_dir():
        raise DataError(f"data: expected a JSONL file or a hub data set, got the directory {path}.")
    if path.suffix in (".jsonl", ".json") or source.startswith((".", "/", "~")):
        raise DataError(f"data: the file {source} does not exist.")
    return _read_hub(source)


def parse_example(value: Any, where: str) -> Example:
    """Check one decoded line. Raises DataError beginning with ``where``."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected {EXPECTED}; got {_describe(value)}.")
    if "messages" in value:
        return Example(where, messages=_check_messages(value["messages"], where))
    for field in ("prompt", "completion"):
        if field not in value:
            keys = ", ".join(map(repr, value)) or "no key"
            raise DataError(f"{where}: expected {EXPECTED}; {field!r} is missing, got {keys}.")
        if not isinstance(value[field], str):
            kind = _describe(value[field])
            raise DataError(f"{where}: {field!r}: expected a string, got {kind}.")
    if not value["completion"]:
        raise DataError(f"{where}: 'completion': expected some text to learn, got an empty string.")
    return Example(where, prompt=value["prompt"], completion=value["completion"])


def write_examples(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_jsonl(path: Path) -> list[Example]:
    examples = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: expected UTF-8 text, got {error.reason}.") from None
            except ValueError as error:
                raise DataError(
                    f"{where}: expected one JSON object a line ({EXPECTED}), but it does not "
                    f"parse: {error}."
                ) from None
            if line:
                examples.append(parse_example(value, where))
    if not examples:
        raise DataError(f"{path}: expected at least one example, got an empty file.")
    return examples


def _read_hub(name: str) -> list[Example]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"data: {name!r} is not a file; to load it as a hub data set, `pip install datasets`."
        )
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise DataError(
            f"data: {name!r} is not a file, and could not be loaded as a hub data set: {error}"
        ) from error
    return [parse_example(row, f"{name}, row {i}") for i, row in enumerate(rows)]


def _check_messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: 'messages': expected a list of {{'role', 'content'}} objects, got "
            f"{_describe(messages)}."
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: messages[{i}]: expected an object with 'role' and 'content', got "
                f"{_describe(message)}."
            )
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: messages[{i}]: 'role': expected one of {', '.join(ROLES)}, got "
                f"{message.get('role')!r}."
            )
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: messages[{i}]: 'content': expected a string, got "
                f"{_describe(message.get('content'))}."
            )
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            f"{where}: 'messages': expected a turn of the assistant to learn, got none."
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
