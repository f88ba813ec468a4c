"""A command's options from a dataclass, and from a YAML file that the command line overrides."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperCommand

_CONFIG = "YAML file with any of these options; the command line overrides it."


# What other trainers call some of the options.
_SAME = {
    "base_model": "model",
    "model_name_or_path": "model",
    "output_dir": "output",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "learning_rate": "lr",
    "warmup_ratio": "warmup",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "max_length": "seq_len",
}


def meant(name: str, known: Collection[str]) -> list[str]:
    """Give the option that an unknown name likely stands for, if any."""
    same = _SAME.get(name, "")
    return [same] if same in known else difflib.get_close_matches(name, known, n=1)


class Command(TyperCommand):
    """A command that knows what other trainers call some of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's; an unknown option is refused with the one that was likely meant."""
        known = {option for each in self.params for option in each.opts}
        for word in args:
            option = word.partition("=")[0]
            same = _SAME.get(option.removeprefix("--").replace("-", "_"), "").replace("_", "-")
            if option.startswith("--") and option not in known and f"--{same}" in known:
                ctx.fail(f"No such option: {option}; did you mean --{same}?")
        return super().parse_args(ctx, args)


def options_of(fields: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function of keywords the fields of a dataclass as its typer options, and --config.

    Each field's ``metadata["help"]`` is its option's help. The function is called with the fields'
    values.
    """
    types = typing.get_type_hints(fields)
    parameters = []
    for field in dataclasses.fields(fields):
        default = ... if field.default is dataclasses.MISSING else field.default
        option = typer.Option(default, help=field.metadata["help"])
        parameters.append(_parameter(field.name, types[field.name], option))

    def use(context: typer.Context, value: Path | None) -> None:
        if value is not None:
            context.default_map = read_config_file(value, types)

    config = typer.Option(None, is_eager=True, callback=use, help=_CONFIG)
    parameters.append(_parameter("config", Path | None, config))

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        def declared(config: None, **values: Any) -> None:
            function(**values)

        declared.__name__, declared.__doc__ = function.__name__, function.__doc__
        # What typer reads an option from.
        vars(declared)["__signature__"] = inspect.Signature(parameters)
        declared.__annotations__ = {each.name: each.annotation for each in parameters}
        return declared

    return declare


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def read_config_file(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values by option name; keys may be written with ``-`` or ``_``.

    Args:
        path: of the file.
        types: what the options are, by name.

    Raises typer.BadParameter naming the file, and the line and the key where one is unknown or has
    another value than its option takes.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data, lines = yaml.safe_load(text), _lines(text)
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
        name, where = str(key).replace("-", "_"), f"{path}, line {lines.get(str(key), 1)}"
        if name not in types:
            near = meant(name, types)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(types))}."
            )
            raise typer.BadParameter(f"{where}: unknown key {str(key)!r}; {hint}")
        if isinstance(value, list) and name == "target_modules":
            value = ",".join(map(str, value))
        if isinstance(value, dict) and name == "method_options":
            value = yaml.safe_dump(value, default_flow_style=True, width=1e9).strip()[1:-1]
        if isinstance(value, list | dict):
            raise typer.BadParameter(
                f"{where}: {key}: expected a single value, got {type(value).__name__} {value!r}."
            )
        if value is not None:
            values[name] = _checked(value, types[name], f"{where}: {key}")
    return values


def _checked(value: Any, annotation: Any, where: str) -> Any:
    """A value as the option has it; YAML reads ``1e-3`` as a text, and ``8`` for ``8.0``."""
    (kind,) = {*(typing.get_args(annotation) or (annotation,))} - {type(None)}
    try:
        if isinstance(value, bool) == (kind is bool) and not (
            kind is int and isinstance(value, float)
        ):
            return kind(value)
    except ValueError:
        pass
    raise typer.BadParameter(f"{where}: expected {kind.__name__}, got {value!r}.")


def _lines(text: str) -> dict[str, int]:
    """The line of every key of the mapping that the text is, from 1."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
