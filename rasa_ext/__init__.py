"""RaSA (Rank-Sharing Low-Rank Adaptation, arXiv 2503.12576) for PyTorch.

rasa_ext.patch_model(model, rank=8, k=1)      # then train with what you already use
rasa_ext.save_adapter(model, "adapter")
rasa_ext.merge_and_unload(model)              # or rasa_ext.export_lora(model, "lora")
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rasa_ext._version import __version__ as __version__

if TYPE_CHECKING:
    from rasa_ext.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because the command's help and checks need no torch."""
    if find_spec(f"rasa_ext.{name}") is not None:
        return import_module(f"rasa_ext.{name}")
    value = getattr(import_module("rasa_ext.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *import_module("rasa_ext.api").__all__]
