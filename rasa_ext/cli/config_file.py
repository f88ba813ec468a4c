"""``--config FILE.yaml``: options from a file, which the command line overrides."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer
import yaml


def use_config_file(context: typer.Context, value: Path | None) -> Path | None:
    """Callback of an eager ``--config`` option: make the file's values the options' defaults.

    Raises typer.BadParameter naming the file, and the key where one is unknown.
    """
    if value is None:
        return None
    known = {parameter.name for parameter in context.command.params} - {"config", "help", None}
    context.default_map = read_config_file(value, known)
    return value


def read_config_file(path: Path, known: set[str]) -> dict[str, Any]:
    """The file's values by option name; keys may be written with ``-`` or ``_``."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: expected YAML, but it does not parse: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise typer.BadParameter(
            f"{path}: expected a mapping of option names to values, got {type(data).__name__}."
        )
    values = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
            )
            raise typer.BadParameter(f"{path}: unknown key {str(key)!r}; {hint}")
        if isinstance(value, list) and name == "target_modules":
            value = ",".join(map(str, value))
        if isinstance(value, list | dict):
            raise typer.BadParameter(
                f"{path}: {key}: expected a single value, got {type(value).__name__} {value!r}."
            )
        if value is not None:
            values[name] = value
    return values
