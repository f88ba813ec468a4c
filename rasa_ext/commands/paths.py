"""Checks of models' and adapters' paths, which run before torch is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rasa_ext.commands.output import console
from rasa_ext.writing import CONFIG

SMOLLM2 = "smollm2"  # the name of the demo's model, local or on the hub


class ModelError(ValueError):
    """A model that cannot be loaded. The message names the model and says what to do."""


def is_adapter(path: Path) -> bool:
    """Return whether a path is the directory of an adapter of any method."""
    return (path / CONFIG).is_file()


def check_adapter(path: Path, argument: str = "adapter", otherwise: str = "") -> None:
    """Raise FileNotFoundError if a path is no adapter's directory.

    The hub is not searched; only options for models take hub ids. ``otherwise`` ends the message.
    """
    if is_adapter(path):
        return
    what = f"{path} holds no {CONFIG}" if path.is_dir() else f"{path} does not exist"
    if path.is_file():
        what = f"{path} is a file"
    raise FileNotFoundError(f"{argument}: expected an adapter's directory, but {what}.{otherwise}")


def check_model(name: str, *instead: str) -> Path | None:
    """Return the path of a model's directory or .gguf file; None if the name is a hub id.

    ``instead`` names files that a directory may have in place of a model's config.json.

    Raises ModelError if a path does not exist, or has an adapter or other files but no model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model: the file {name} does not exist.")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"model: reading {path.name} needs the package gguf: pip install gguf")
        return path
    if path.is_dir():
        _check_directory(path, instead)
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: the directory {name} does not exist.")
    return None


def _check_directory(path: Path, instead: tuple[str, ...]) -> None:
    if any((path / name).is_file() for name in instead):
        return
    if is_adapter(path):  # transformers would load the base that it names
        from rasa_ext.checkpoint.files import read_config

        base = read_config(path).get("base_model_name_or_path")
        raise ModelError(
            f"model: expected a base model, but {path} is an adapter's directory; pass the "
            f"adapter's base ({base}), or a merged model from `rasa-ext merge`. To train the "
            f"adapter further, pass the base and `--init-adapter {path}` to `rasa-ext sft`."
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model: expected a model's directory, with a config.json, but {path} "
            f"{'holds none' if any(path.iterdir()) else 'is empty'}."
        )


def trained_with_template(name: str | Path) -> bool:
    """Return whether an adapter was trained with the chat template; True for other models."""
    from rasa_ext.checkpoint.files import CONFIG, read_config

    adapter = (Path(name) / CONFIG).is_file()
    return not adapter or bool(read_config(name).get("rasa_template", True))


def note_template(adapter: Path) -> None:
    """Print that an adapter was trained without a chat template."""
    if not trained_with_template(adapter):
        console.print(
            "The adapter was trained without a chat template: send it plain prompts, and pass "
            "--no-template to evaluate and generate."
        )
