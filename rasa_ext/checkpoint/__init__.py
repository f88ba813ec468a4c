"""Adapter directories: this package's, the official code's, and plain LoRAs."""

from rasa_ext.checkpoint.adapter import own_key, pool_key, saved_tensors
from rasa_ext.checkpoint.expert_names import StackedWeight, stacked_weights
from rasa_ext.checkpoint.files import (
    PREFIX,
    check_finite,
    check_tensors,
    read_adapter,
    write_adapter,
)
from rasa_ext.checkpoint.loading import AdapterState
from rasa_ext.checkpoint.lora import Lora, convert_lora, read_lora
from rasa_ext.checkpoint.lora_export import Truncation
from rasa_ext.checkpoint.lora_file import plain_settings
from rasa_ext.checkpoint.official import load_official_tensors, official_name

__all__ = [
    "PREFIX",
    "AdapterState",
    "Lora",
    "StackedWeight",
    "Truncation",
    "check_finite",
    "check_tensors",
    "convert_lora",
    "load_official_tensors",
    "official_name",
    "own_key",
    "plain_settings",
    "pool_key",
    "read_adapter",
    "read_lora",
    "saved_tensors",
    "stacked_weights",
    "write_adapter",
]
