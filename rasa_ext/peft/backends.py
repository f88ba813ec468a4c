"""PEFT's backends for quantized bases, as layers of other PEFT methods have them."""

from __future__ import annotations

from typing import Any

from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from rasa_ext.base_layers.quantized import format_of


def backend_of(base: nn.Module, model: nn.Module) -> Any:
    """Return PEFT's backend for a layer of ``model``, or None if the layer is not quantized.

    PEFT's reports name the backend, and other code reads and writes quantized weights through it.
    Merging does not use it: it dequantizes, see ``patching.merge_quantized``.
    """
    if format_of(base) is None:
        return None
    given = get_quantization_kwargs(model)
    given.setdefault("get_apply_tensor_subclass", _unknown)
    return resolve_quantization_backend(base, **given)


def _unknown() -> Any:
    raise NotImplementedError(
        "torchao: a changed weight can be quantized again only if transformers quantized the "
        "model, from a TorchAoConfig; load the model that way."
    )
