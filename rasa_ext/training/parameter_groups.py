"""Parameter groups for an optimizer, where a method wants rates of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from rasa_ext.methods.lora import BlockLoraConfig
from rasa_ext.methods.pooled import PooledConfig
from rasa_ext.patching.state import adapted_layers, adapter_parameters, patch_state
from rasa_ext.training.gates import gated


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    eps: float | None = None,
) -> list[dict[str, Any]]:
    """Give an optimizer's parameter groups for a patched model, with the rates of its method.

    Gates are not decayed. A Block-LoRA's B, the sum of its n blocks, moves n times as fast, and has
    an n-th of the decay, which the rate multiplies. A SoRA's d = s g moves s times as fast as its
    gates g would, and has ``eps`` over s, so that under Adam the trajectory is that of g.
    Everything else goes in one group.

    Args:
        model: a patched model.
        lr: the learning rate.
        gate_lr: that of gates; ``lr`` unless given.
        weight_decay: for all that are no gates.
        eps: Adam's; the optimizer's own for all groups unless given.

    Returns:
        Groups, each with ``params``, ``lr``, ``weight_decay`` and ``eps`` where it was given, none
        of them empty.

    Raises:
        TypeError, ValueError: the model is no module, or not patched; ``gate_lr`` is given for one
            without gates.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> groups = rasa_ext.training.parameter_groups(model, lr=5e-4)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    config, layers = patch_state(model).config, adapted_layers(model)
    rates: dict[int, _Rate] = {}
    if isinstance(config, BlockLoraConfig):
        n = config.blocks
        rates = {id(layer.B): _Rate(n * lr, weight_decay / n, 1.0) for _, layer in layers}
    gates = gated(model, config) if isinstance(config, PooledConfig) else []
    if gate_lr is not None and not gates:
        raise ValueError(
            f"gate_lr: expected None for {type(config).__name__} without gates, got {gate_lr}."
        )
    for d, _, scale in gates:
        s = scale if config.method == "sora" else 1.0
        rates[id(d)] = _Rate((lr if gate_lr is None else gate_lr) * s, 0.0, s)
    usual = _Rate(lr, weight_decay, 1.0)
    found: dict[_Rate, list[nn.Parameter]] = {}
    for parameter in adapter_parameters(model):
        if parameter.requires_grad:
            found.setdefault(rates.get(id(parameter), usual), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for rate, parameters in found.items():
        group = {"params": parameters, "lr": rate.lr, "weight_decay": rate.weight_decay}
        groups.append(group if eps is None else {**group, "eps": eps / rate.scale})
    return groups


class _Rate(NamedTuple):
    lr: float
    weight_decay: float
    scale: float
