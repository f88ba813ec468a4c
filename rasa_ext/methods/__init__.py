"""The methods, one config each: which factors a layer owns and which it gives to its group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rasa_ext.methods.base import AdapterConfig, other_method
from rasa_ext.methods.rasa import RasaConfig

METHODS: dict[str, type[AdapterConfig]] = {config.peft_type: config for config in (RasaConfig,)}
"""By the name that a method has in ``adapter_config.json``."""


def read_method(data: Mapping[str, Any]) -> AdapterConfig:
    """Read the content of an ``adapter_config.json``, whatever its method.

    Raises:
        ValueError: the method is not one of these, or a field is missing or not supported.
    """
    kind = data.get("peft_type")
    if kind not in METHODS:
        known = " or ".join(map(repr, METHODS))
        raise ValueError(f"adapter_config.json: expected peft_type {known}, {other_method(kind)}.")
    return METHODS[kind].from_dict(data)
