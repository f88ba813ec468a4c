"""Tables of the configs' fields, read from the sources without importing them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rasa_ext"


class Field(NamedTuple):
    """One field as its source has it: ``name: type = option(default, help)``."""

    name: str
    default: str
    help: str


class _Literal(str):
    """A name of the source that stands for itself, such as ``torch.float32``."""

    __repr__ = str.__str__

    def __getattr__(self, name: str) -> _Literal:
        return _Literal(f"{self}.{name}")


def fields(path: str | Path, class_name: str, **names: object) -> list[Field]:
    """The fields of a config in their order; ``names`` are those that its help texts use."""
    tree = ast.parse((PACKAGE / path).read_text())
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    scope = {
        "option": lambda default, text, counts=0: (default, text),
        "ALL_LINEAR": "all-linear",
        "torch": _Literal("torch"),
        **names,
    }
    bases = (ast.unparse(base) for base in node.bases)
    inherited = (each for base in bases if base in CLASSES for each in fields(CLASSES[base], base))
    found = {each.name: each for each in inherited}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call):
            default, text = eval(ast.unparse(line.value), scope)
            name = ast.unparse(line.target)
            found[name] = Field(name, repr(default), text)
    return list(found.values())


def rasa_fields() -> list[Field]:
    """Those of ``rasa_ext.RasaConfig``: its own first, then those that all methods share."""
    own = fields("methods/rasa.py", "RasaConfig")
    return own + fields("methods/base.py", "AdapterConfig")


_NODES = {
    node.name: (path, node.body)
    for package in ("rasa_ext", "research/rasa_research")
    for path in sorted((ROOT / package / "methods").glob("*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef) and node.name != "AdapterConfig"
}
CLASSES = {name: path for name, (path, _) in _NODES.items()}
"""Where the classes of both packages' methods are, but for what all methods share."""
METHODS = {
    name: path
    for name, (path, body) in _NODES.items()
    if name != "RasaConfig"
    and any(ast.unparse(node).startswith("method: ClassVar[str] = ") for node in body)
}
"""Where the configs are, but for RaSA's."""


def method_table(name: str) -> str:
    """The table for a method's config, without what all methods share."""
    return table(fields(METHODS[name], name))


def peft_fields() -> list[Field]:
    """Those of ``rasa_ext.peft.RasaConfig``."""
    helps = {field.name: field.help for field in rasa_fields()}

    def shared(name: str, more: str = "", default: object = None) -> tuple[object, str]:
        return default, f"{helps[name]} {more}".rstrip()

    names = {"_option": lambda default, text: (default, text), "_shared": shared}
    return fields("peft/config.py", "RasaConfig", **names)


def table(rows: list[Field]) -> str:
    """Markdown of the fields."""
    lines = ["| field { .fields } | default | |", "| --- | --- | --- |"]
    for row in rows:
        text = row.help.replace("*", r"\*").replace("<", "&lt;")
        lines.append(f"| `{row.name}` | `{row.default}` | {text} |")
    return "\n".join(lines)


def rasa_table() -> str:
    """The table for ``rasa_ext.RasaConfig``."""
    return table(rasa_fields())


def peft_table() -> str:
    """The table for ``rasa_ext.peft.RasaConfig``."""
    return table(peft_fields())
