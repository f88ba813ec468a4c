"""Tables of the configs' fields, read from the sources without importing them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "rasa_ext"


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


def fields(path: str, class_name: str, **names: object) -> list[Field]:
    """The fields of a config in their order; ``names`` are those that its help texts use."""
    tree = ast.parse((PACKAGE / path).read_text())
    (body,) = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    scope = {
        "option": lambda default, text: (default, text),
        "ALL_LINEAR": "all-linear",
        "torch": _Literal("torch"),
        **names,
    }
    found = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            default, text = eval(ast.unparse(node.value), scope)
            found.append(Field(ast.unparse(node.target), repr(default), text))
    return found


def rasa_fields() -> list[Field]:
    """Those of ``rasa_ext.RasaConfig``: its own first, then those that all methods share."""
    own = fields("methods/rasa.py", "RasaConfig")
    return own + fields("methods/base.py", "AdapterConfig")


METHODS = {
    node.name: f"methods/{path.name}"
    for path in sorted((PACKAGE / "methods").glob("*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef)
    and node.name != "RasaConfig"
    and any(ast.unparse(each).startswith("method: ClassVar[str] = ") for each in node.body)
}
"""Where the configs of ``rasa_ext.methods`` are, but for RaSA's."""


def method_table(name: str) -> str:
    """The table for a config of ``rasa_ext.methods``, without what all methods share."""
    return table(fields(METHODS[name], name))


def peft_fields() -> list[Field]:
    """Those of ``rasa_ext.peft.RasaConfig``."""
    helps = {field.name: field.help for field in rasa_fields()}
    return fields(
        "peft/config.py", "RasaConfig", _HELP=helps, _option=lambda default, text: (default, text)
    )


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
