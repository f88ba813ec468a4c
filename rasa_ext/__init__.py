"""RaSA (Rank-Sharing Low-Rank Adaptation, arXiv 2503.12576) for PyTorch.

rasa_ext.patch_model(model, rank=8, k=1)      # then train with what you already use
rasa_ext.save_adapter(model, "adapter")
rasa_ext.merge_and_unload(model)              # or rasa_ext.export_lora(model, "lora")
"""

from rasa_ext import distributed
from rasa_ext._version import __version__
from rasa_ext.checkpoint import load_adapter, save_adapter
from rasa_ext.checkpoint_weights import SafetensorsFolder
from rasa_ext.compression import Compressed, compress
from rasa_ext.config import RasaConfig
from rasa_ext.decomposition import Decomposition, decompose
from rasa_ext.export import export_lora
from rasa_ext.fitting import fit
from rasa_ext.importing import import_lora
from rasa_ext.merging import (
    delta_weight,
    delta_weights,
    disable_adapter,
    merge,
    merge_and_unload,
    unmerge,
    unpatch,
)
from rasa_ext.modules import RasaLinear, RasaPool
from rasa_ext.official import load_official
from rasa_ext.ops import cuda_status
from rasa_ext.patch import patch_model
from rasa_ext.record import adapter_parameters, repack
from rasa_ext.report import summary

__all__ = [
    "Compressed",
    "Decomposition",
    "RasaConfig",
    "RasaLinear",
    "RasaPool",
    "SafetensorsFolder",
    "__version__",
    "adapter_parameters",
    "compress",
    "cuda_status",
    "decompose",
    "delta_weight",
    "delta_weights",
    "disable_adapter",
    "distributed",
    "export_lora",
    "fit",
    "import_lora",
    "load_adapter",
    "load_official",
    "merge",
    "merge_and_unload",
    "patch_model",
    "repack",
    "save_adapter",
    "summary",
    "unmerge",
    "unpatch",
]
