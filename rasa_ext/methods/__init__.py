"""The methods, one config each: which factors a layer owns and which it gives to its group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rasa_ext.methods.base import OFFICIAL, AdapterConfig, other_method
from rasa_ext.methods.boosted_pool import BoostedPoolConfig
from rasa_ext.methods.lora import BlockLoraConfig, LoraConfig
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.methods.reslora import ResLoraConfig
from rasa_ext.methods.sbora import SboraConfig
from rasa_ext.methods.sd_lora import SdLoraConfig
from rasa_ext.methods.sora import SoraConfig

__all__ = [
    "METHODS",
    "AdapterConfig",
    "BlockLoraConfig",
    "BoostedPoolConfig",
    "LoraConfig",
    "RasaConfig",
    "ResLoraConfig",
    "SboraConfig",
    "SdLoraConfig",
    "SoraConfig",
    "read_method",
]

METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (
        RasaConfig,
        LoraConfig,
        BlockLoraConfig,
        SboraConfig,
        SoraConfig,
        ResLoraConfig,
        SdLoraConfig,
        BoostedPoolConfig,
    )
}
"""By the name that a method has in files and on the command line."""


def read_method(data: Mapping[str, Any]) -> AdapterConfig:
    """Read the content of an ``adapter_config.json``, whatever its method.

    Raises:
        ValueError: the method is not one of these, or a field is missing or not supported.
    """
    if (kind := data.get("peft_type")) != AdapterConfig.peft_type:
        raise ValueError(
            f"adapter_config.json: expected peft_type {AdapterConfig.peft_type!r}, "
            f"{other_method(kind)}."
        )
    method = data.get("rasa_method", OFFICIAL)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"adapter_config.json: expected rasa_method {' or '.join(map(repr, METHODS))}, got "
            f"{method!r}; a newer rasa_ext may know it."
        )
    return METHODS[method].from_dict(data)
