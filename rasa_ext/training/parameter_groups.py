"""Parameter groups for an optimizer, where a method wants rates of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from rasa_ext.methods.lora import BlockLoraConfig
from rasa_ext.methods.pooled import PooledConfig
from rasa_ext.patching.state import adapted_layers, adapter_parameters, patch_state


def parameter_groups(
    model: nn.Module, lr: float, *, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Give an optimizer's parameter groups for a patched model, with the rates of its method.

    Gates are not decayed. A Block-LoRA's B moves n times as fast, n being its blocks. A SoRA's
    d = s g moves s times as fast as its gates g would. Everything else goes in one group.

    Args:
        model: a patched model.
        lr: the learning rate.
        gate_lr: that of gates; ``lr`` unless given.
        weight_decay: for all that are no gates.

    Returns:
        Groups, each with ``params``, ``lr`` and ``weight_decay``, none of them empty.

    Raises:
        TypeError, ValueError: the model is no module, or not patched.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> groups = rasa_ext.training.parameter_groups(model, lr=5e-4)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    config, layers = patch_state(model).config, adapted_layers(model)
    special: dict[int, float] = {}
    if isinstance(config, BlockLoraConfig):
        special = {id(layer.B): config.blocks * lr for _, layer in layers}
    gates: dict[int, float] = {}
    if isinstance(config, PooledConfig):
        for _, layer in layers:
            entries = config.gate_entries(*config.ranks_at(layer.place))
            if entries.stop > entries.start:
                scale = config.gate_scale(layer.place.num_layers) if config.method == "sora" else 1
                gates[id(layer.d)] = (lr if gate_lr is None else gate_lr) * scale
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in adapter_parameters(model):
        if parameter.requires_grad:
            rate = gates.get(id(parameter), special.get(id(parameter), lr))
            decay = 0.0 if id(parameter) in gates else weight_decay
            found.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in found.items()
    ]
