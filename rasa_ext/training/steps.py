"""What a method that changes its adapter between steps needs: the layers, and other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from rasa_ext.distributed import check_unwrapped, follow
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.nn.rasa import RasaLinear, RasaPool
from rasa_ext.patching.state import adapted_layers, check_unmerged, owners, patch_state

Config = TypeVar("Config", bound=AdapterConfig)


def adapter_of(model: nn.Module, *methods: type[Config]) -> tuple[Config, dict[str, RasaLinear]]:
    """Give the config of a patched model, and its adapted linear layers.

    Args:
        model: a patched model.
        methods: the config classes that are expected.

    Returns:
        The config, and the layers by name in the model's order.

    Raises:
        TypeError, ValueError: the model is no module, not patched, or patched with another method.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> config, layers = rasa_ext.training.adapter_of(model, rasa_ext.RasaConfig)
        >>> config.rank, len(layers)
        (8, 14)
    """
    config = patch_state(model).config
    if not isinstance(config, methods):
        expected = " or ".join(method.__name__ for method in methods)
        raise ValueError(
            f"model: expected one patched with {expected}, got {type(config).__name__}."
        )
    return config, dict(adapted_layers(model))


@torch.no_grad()
def replace_tensors(
    model: nn.Module,
    config: AdapterConfig,
    tensors: Mapping[RasaLinear | RasaPool, Mapping[str, Tensor]],
) -> None:
    """Let layers and pools own other tensors, under a config that makes tensors of these shapes.

    Parameters are trained from then on, other tensors are buffers. In many processes, every one
    calls this, and parameters get the first process's values.

    Args:
        model: a patched model.
        config: the model's from now on.
        tensors: by name, for each layer and each pool that changes: all that it then owns.

    Raises:
        TypeError, ValueError: the model is no module, or not patched; or there are new parameters,
            and it is wrapped in DistributedDataParallel. The model is then unchanged.
        RuntimeError: the adapter is merged.

    Example:
        >>> import dataclasses
        >>> config = rasa_ext.methods.LoraConfig(rank=2, target_modules=["up_proj"])
        >>> model = rasa_ext.patch_model(model, config=config)
        >>> config, layers = rasa_ext.training.adapter_of(model, rasa_ext.methods.LoraConfig)
        >>> later = dataclasses.replace(config, rank=3)
        >>> larger = {layer: later.own(layer.place) for layer in layers.values()}
        >>> rasa_ext.training.replace_tensors(model, later, larger)
        >>> {row.R for row in rasa_ext.summary(model)}
        {3}
    """
    check_unmerged(model)
    if any(
        isinstance(tensor, nn.Parameter) and all(tensor is not each for each in owner.parameters())
        for owner, own in tensors.items()
        for tensor in own.values()
    ):
        check_unwrapped(model)
    patch_state(model).config = config
    for _, each in owners(model):
        each.config = config
    for owner, own in tensors.items():
        if isinstance(owner, RasaPool):
            owner.replace(own)
        else:
            owner.replace(config, own)
    follow(model)
