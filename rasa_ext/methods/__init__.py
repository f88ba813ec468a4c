"""Adapter methods, with one config class each, which define the tensors of layers and groups."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from rasa_ext.methods.base import (
    METHODS,
    OFFICIAL,
    AdapterConfig,
    Rate,
    checked_choice,
    checked_integer,
    checked_number,
    document_fields,
    fresh_A,
    fresh_B,
    option,
)
from rasa_ext.methods.lora import LoraConfig
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.nn.adapter import LayerSpec
from rasa_ext.ops import Factors

__all__ = [
    "AdapterConfig",
    "Factors",
    "LayerSpec",
    "LoraConfig",
    "RasaConfig",
    "Rate",
    "checked_choice",
    "checked_integer",
    "checked_number",
    "document_fields",
    "every_method",
    "fresh_A",
    "fresh_B",
    "method_named",
    "option",
    "read_method",
]


def every_method() -> dict[str, type[AdapterConfig]]:
    """Return the methods by name: defined classes and those announced by installed packages.

    Returns:
        A copy. A package announces methods in the package metadata, under the entry-point group
        ``rasa_ext.methods``: names and the config classes, or modules that define them.

    Raises:
        ImportError: an announced module or class cannot be imported.

    Example:
        >>> rasa_ext.methods.every_method()["lora"]
        <class 'rasa_ext.methods.lora.LoraConfig'>
    """
    for announced in entry_points(group="rasa_ext.methods"):
        announced.load()
    return dict(METHODS)


def method_named(name: Any, what: str = "method") -> type[AdapterConfig]:
    """Return a method's config class, loading methods of installed packages if needed.

    Args:
        name: the method's name, as in files and on the command line.
        what: the argument or field that gave the name, for the error.

    Returns:
        The class, a subclass of ``AdapterConfig``.

    Raises:
        ValueError: no method has this name.

    Example:
        >>> rasa_ext.methods.method_named("rasa")
        <class 'rasa_ext.methods.rasa.RasaConfig'>
    """
    if isinstance(name, str):
        config = METHODS.get(name) or every_method().get(name)
        if config is not None:
            return config
    raise ValueError(
        f"{what}: expected {' or '.join(map(repr, sorted(every_method())))}, got {name!r}; "
        "upgrade rasa_ext, or install the package that defines the method, such as rasa_research "
        "by `pip install ./research`."
    )


def read_method(data: Mapping[str, Any]) -> AdapterConfig:
    """Read the content of an ``adapter_config.json`` of any method.

    Raises:
        ValueError: the method is unknown, or a field is missing or not supported.
    """
    name = data.get("rasa_method", OFFICIAL)
    return method_named(name, "adapter_config.json: rasa_method").from_dict(data)
