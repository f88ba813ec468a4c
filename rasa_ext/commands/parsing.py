"""Options that several commands share, and options made from the fields of a dataclass.

Nothing here imports torch, so ``--help`` and the documentation do not need it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from rasa_ext.writing import STALE, check_output

__all__ = ["Output", "Overwrite", "check_differs", "parse_targets"]

_MISSING = dataclasses.MISSING
LISTS = ("data", "eval_data")  # options that may be repeated
DTYPES = ("auto", "float32", "bfloat16", "float16")

# The options of a command that writes a directory.
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")]
Overwrite = Annotated[
    bool, typer.Option(help="Replace an earlier model in the output directory; other files stay.")
]


def options_of(
    fields: type, others: Mapping[str, str], same: Collection[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a decorator that adds a dataclass's fields, and ``config``, as keyword parameters.

    The help of each field comes from the section ``Args`` of the dataclass's docstring. It is
    copied into the function's docstring, where `rasa_ext.commands.output.command` reads it.
    ``others`` maps other programs' names for the fields to ours. A config file may have the names
    in ``same``; errors suggest ours for the others.
    """
    types = typing.get_type_hints(fields)

    def use(context: typer.Context, value: Path | None) -> None:
        if value is not None:
            context.default_map = _read_config_file(value, defaults, others, same)

    text = "YAML file with any of these options; the command line overrides it."
    config = typer.Option(is_eager=True, callback=use, help=text)
    types["config"] = Annotated[Path | None, config]
    defaults = {field.name: field.default for field in dataclasses.fields(fields)}

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        def declared(config: None, **values: Any) -> None:
            function(**values)

        kind, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
        parameters = [
            inspect.Parameter(name, kind, default=empty if default is _MISSING else default)
            for name, default in {**defaults, "config": None}.items()
        ]
        vars(declared)["__signature__"] = inspect.Signature(parameters)
        declared.__name__, declared.__annotations__ = function.__name__, types
        # Python 3.13 removes the indentation of docstrings, and older versions do not.
        about, entries = (inspect.getdoc(source) or "" for source in (function, fields))
        declared.__doc__ = f"{about}\n\nArgs:\n" + entries.partition("Args:\n")[2]
        return declared

    return declare


def _read_config_file(
    path: Path, known: Collection[str], others: Mapping[str, str], same: Collection[str]
) -> dict[str, Any]:
    """Read a file's values by option name, as texts that typer parses like the command line's.

    Keys may be written with ``-`` or ``_``. Raises typer.BadParameter, which names the file and any
    unknown key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: expected YAML, but it does not parse: {error}") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise typer.BadParameter(f"{path}: expected option names with values, got {kind}.")
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        name = others[name] if name in same else name
        if name not in known:
            near = others.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
            hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}."
            raise typer.BadParameter(f"{path}: unknown key {str(key)!r}; {hint}")
        if isinstance(value, dict):
            value = yaml.safe_dump(value, default_flow_style=True, width=1e9).strip()[1:-1]
        if name in LISTS and value is not None:
            values[name] = list(map(str, value)) if isinstance(value, list) else [str(value)]
        elif value is not None:
            values[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return values


def parse_yaml(option: str, text: str) -> dict[str, Any]:
    """Parse an option's YAML. Raises ValueError unless it is a list of names and values."""
    try:
        values = yaml.safe_load(f"{{{text}}}")
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or None in values.values():
        raise ValueError(f"{option}: expected YAML such as 'name: 4', got {text!r}.")
    # YAML 1.1 reads 1e-3 as text, because the number has no decimal point.
    exponent = re.compile(r"[-+]?\d+[eE][-+]?\d+")
    return {n: float(v) if exponent.fullmatch(str(v)) else v for n, v in values.items()}


def parse_targets(text: str) -> str | list[str]:
    """Parse `--target-modules`: "all-linear", comma-separated suffixes, or `regex:` and a pattern.

    Args:
        text: the option's value.

    Returns:
        The value for the field ``target_modules`` of a config.

    Raises:
        ValueError: ``text`` has none of these forms.

    Example:
        >>> from rasa_ext.commands.parsing import parse_targets
        >>> parse_targets("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    if text == "all-linear":
        return text
    if text.startswith("regex:"):
        return text.removeprefix("regex:")  # the config checks the expression
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        forms = "'all-linear', names separated by commas, or 'regex:' and an expression"
        raise ValueError(f"target_modules: expected {forms}, got {text!r}.")
    return names


def check_least(**numbers: tuple[float | None, float]) -> None:
    """Raise ValueError if an option is below its minimum; None always passes."""
    for name, (value, least) in numbers.items():
        if value is not None and not value >= least:  # also rejects NaN
            raise ValueError(f"{name}: expected at least {least}, got {value}.")


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless ``dtype`` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")


def check_seed(seed: int) -> None:
    """Raise ValueError unless all random generators take the seed; numpy's range is smallest."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer from 0 to 2**32 - 1, got {seed}.")


def check_differs(
    sources: Iterable[str | Path], output: Path, *, overwrite: bool, beside: Iterable[str] = STALE
) -> None:
    """Check that ``output`` can be written and is none of the sources.

    Args:
        sources: folders that the command reads; hub ids may be among them.
        output: the folder to write.
        overwrite: whether ``output`` may contain files.
        beside: patterns of files that readers would load together with the new ones. By default a
            model's weights, since transformers puts an adapter on top of a model in one folder.

    Raises:
        ValueError: ``output`` is one of the sources or a file, or contains files, or with
            ``overwrite`` a file of ``beside``.
        OSError: ``output`` cannot be written (a ``WriteError``).

    Example:
        >>> from pathlib import Path
        >>> from rasa_ext.commands.parsing import check_differs
        >>> check_differs(["checkpoint"], Path("new"), overwrite=False)
    """
    for source in sources:
        if Path(source).resolve() == output.resolve():
            raise ValueError(f"output: expected another directory than the inputs', got {output}.")
    if output.is_file() or output.suffix == ".gguf":
        raise ValueError(f"output: expected a folder, but {output} is a file.")
    check_output(output, overwrite=overwrite)
    if names := [path.name for pattern in beside for path in output.glob(pattern)]:
        why = "since readers would load it with the new files; choose another --output"
        raise ValueError(f"output: expected no {names[0]} in {output}, {why}.")
