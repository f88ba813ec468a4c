"""Selection of an SBoRA's features by the size of the model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.training import adapter_of
from rasa_research.methods import SboraConfig


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Select the features that an SBoRA with ``indices="activation"`` reads, by mean size.

    Every batch runs through the model once, without grad and in eval mode. Each layer then reads
    the r features with the largest mean \\|x_j\\|.

    Args:
        model: patched with ``SboraConfig(indices="activation")``, before training.
        batches: arguments for the model: a mapping holds keyword arguments, a tuple positional
            arguments, and anything else is the only argument.

    Returns:
        The same object.

    Raises:
        ValueError: the model has another config or is already trained, or there is no batch.

    Example:
        >>> from rasa_research import methods, training
        >>> config = methods.SboraConfig(rank=4, indices="activation")
        >>> model = rasa_ext.patch_model(model, config=config)
        >>> model = training.calibrate(model, [torch.tensor([[1, 2, 3]])])
    """
    config, layers = adapter_of(model, SboraConfig)
    if config.indices != "activation":
        raise ValueError(
            "model: expected one patched with SboraConfig(indices='activation'), got indices="
            f"{config.indices!r}."
        )
    for name, layer in layers.items():
        if layer.B.any():
            raise ValueError(
                f"model: expected an untrained adapter, but {name!r} is already trained for its "
                "current features."
            )
    sums: dict[nn.Module, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(_adding_to(sums)) for layer in layers.values()]
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple):
                model(*batch)
            else:
                model(batch)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError("batches: expected at least one batch that reaches an adapted layer.")
    for layer in layers.values():
        if layer in sums:
            layer.own_tensors()["index"].copy_(sums[layer].topk(config.rank).indices.sort().values)
    return model


def _adding_to(sums: dict[nn.Module, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        size = args[0].detach().abs().flatten(0, -2).double().sum(0)
        sums[layer] = sums[layer] + size if layer in sums else size

    return add
