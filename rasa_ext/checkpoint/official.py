"""Reading checkpoints of the official RaSA code.

In these, a layer has ``rasa_A.weight``, ``rasa_B.weight`` and ``rasa_mixing.weight`` (private
entries first). A module type has one ``rasa_shared_A.<path with . as __>.weight`` and one
``rasa_shared_B...`` under ``base_model.``, for layers named ``layers.N.<path>``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from torch import Tensor, nn

from rasa_ext.checkpoint.expert_names import stacked_weights
from rasa_ext.checkpoint.files import PREFIX, read_adapter
from rasa_ext.checkpoint.loading import load_tensors_into
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.patching.state import unwrap

_OFFICIAL = {"rasa_A": "rasa_A", "rasa_B": "rasa_B", "rasa_d": "rasa_mixing"}
_OFFICIAL_POOLS = {f"rasa_pool_{part}": f"rasa_shared_{part}" for part in "AB"}


def load_official(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of the official code; patch the model first if needed.

    The official code (github.com/zwhe99/RaSA) names a layer's diagonal d ``rasa_mixing``, private
    entries first, and has one pool per module type. The checkpoint cannot run code: a ``.bin`` is
    read with ``weights_only=True`` or refused.

    In transformers 4 each matrix of each expert was a layer (``experts.3.w1``). A checkpoint of
    such layers is refused if the model stacks them;
    ``rasa_research.checkpoint.load_official_experts`` reads it.

    Args:
        model: the base that the adapter was trained on, or a model patched with an equal config.
        directory: a directory with ``adapter_config.json`` and ``adapter_model.safetensors`` or
            ``adapter_model.bin``.

    Returns:
        The same object.

    Raises:
        FileNotFoundError, ValueError: a file is missing, unsafe or damaged, or does not fit the
            model; the model is unchanged.
        RuntimeError: the model is merged.

    Example:
        >>> model = rasa_ext.load_official(model, "checkpoint")
        >>> rasa_ext.save_adapter(model, "adapter")  # in this package's format
    """
    settings, tensors = read_adapter(directory)
    for weight in stacked_weights(unwrap(model)):
        if any(key.startswith(f"{PREFIX}{weight.path}.") for key in tensors):
            raise ValueError(
                f"{directory}: expected an adapter of linear layers, got one of single experts, "
                f"which the model stacks in {weight.name!r}; load_official_experts of "
                "rasa_research.checkpoint, in the package rasa-ext-research, reads it."
            )
    return load_official_tensors(model, RasaConfig.from_dict(settings), tensors, str(directory))


def load_official_tensors(
    model: nn.Module, config: RasaConfig, tensors: Mapping[str, Tensor], where: str
) -> nn.Module:
    """Load tensors named as in the official code; patch the model first if needed.

    Args:
        model: the base that the adapter was trained on, or a model patched with an equal config.
        config: the adapter's config.
        tensors: tensors by official name; some may have names of this package's files.
        where: start of errors about ``tensors``.

    Returns:
        The same object.

    Raises:
        ValueError: tensors or config do not fit the model, which is unchanged.
        RuntimeError: the model is merged.

    Example:
        >>> settings, tensors = rasa_ext.checkpoint.read_adapter("checkpoint")
        >>> config = rasa_ext.RasaConfig.from_dict(settings)
        >>> model = rasa_ext.checkpoint.load_official_tensors(model, config, tensors, "checkpoint")
    """
    return load_tensors_into(model, config, tensors, where, official_name)


def official_name(key: str) -> str:
    """Return the official name of a tensor of the package's format; leave other names.

    Args:
        key: a name in the package's files, such as from ``own_key`` or ``pool_key``.

    Returns:
        The name in a checkpoint of the official code.

    Example:
        >>> from rasa_ext.checkpoint import official_name, own_key, pool_key
        >>> official_name(own_key("model.layers.3.mlp.up_proj", "d"))
        'base_model.model.model.layers.3.mlp.up_proj.rasa_mixing.weight'
        >>> official_name(pool_key("model.layers.3.mlp.up_proj", "A"))
        'base_model.rasa_shared_A.mlp__up_proj.weight'
    """
    layer, _, part = key.rpartition(".")
    if part in _OFFICIAL:
        return f"{layer}.{_OFFICIAL[part]}.weight"
    if part in _OFFICIAL_POOLS:
        return f"base_model.{_OFFICIAL_POOLS[part]}.{kind_of(layer.removeprefix(PREFIX))}.weight"
    return key


def kind_of(name: str) -> str:
    """Return a layer's pool name: ``self_attn__q_proj`` for ``layers.3.self_attn.q_proj``."""
    return re.sub(r"^.*?\blayers\.\d+\.", "", name).replace(".", "__")
