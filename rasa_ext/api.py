"""The public names, which ``rasa_ext`` imports on first use."""

from rasa_ext import checkpoint, methods, patching, training
from rasa_ext._version import __version__
from rasa_ext.checkpoint.adapter import load_adapter, save_adapter
from rasa_ext.checkpoint.card import Card
from rasa_ext.checkpoint.lora import import_lora
from rasa_ext.checkpoint.lora_export import export_error, export_lora, export_size
from rasa_ext.checkpoint.official import load_official
from rasa_ext.checkpoint.push import push_to_hub
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.nn.adapter import drop_packs
from rasa_ext.nn.rasa import RasaLinear
from rasa_ext.ops import cuda_status
from rasa_ext.patching.merge import (
    delta_weights,
    disable_adapter,
    merge,
    merge_and_unload,
    unmerge,
    unpatch,
)
from rasa_ext.patching.patch import patch_model
from rasa_ext.patching.state import adapter_parameters
from rasa_ext.patching.summary import summary

__all__ = [
    "Card",
    "RasaConfig",
    "RasaLinear",
    "__version__",
    "adapter_parameters",
    "checkpoint",
    "cuda_status",
    "delta_weights",
    "disable_adapter",
    "drop_packs",
    "export_error",
    "export_lora",
    "export_size",
    "import_lora",
    "load_adapter",
    "load_official",
    "merge",
    "merge_and_unload",
    "methods",
    "patch_model",
    "patching",
    "push_to_hub",
    "save_adapter",
    "summary",
    "training",
    "unmerge",
    "unpatch",
]
