"""Every error message of the package, read from its source."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

MARK = "<!-- every error message -->"
VALUE = "…"  # stands for what is filled in


@dataclass(frozen=True)
class Message:
    """``raise error(text)`` somewhere in ``module``."""

    module: str
    error: str
    text: str


def messages(package: Path) -> list[Message]:
    """Those of all ``raise`` statements whose text stands beside them, in the order of files."""
    found: dict[Message, None] = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            text = template(node.exc.args[0]) if node.exc.args else None
            if text:
                found[Message(module, ast.unparse(node.exc.func), text)] = None
    return list(found)


def template(node: ast.expr) -> str | None:
    """A string expression with VALUE for what is only known when it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or VALUE for part in node.values)
    return None


def listed(package: Path) -> str:
    """Markdown: the messages by module."""
    lines: list[str] = []
    module = None
    for message in messages(package):
        if message.module != module:
            module = message.module
            lines += ["", f"### {module}", ""]
        lines.append(f"- {message.error}: ``{' '.join(message.text.split())}``")
    return "\n".join(lines)
