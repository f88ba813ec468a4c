"""Parameter groups for an optimizer, where a method wants rates of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from rasa_ext.methods.base import Rate
from rasa_ext.patching.state import adapter_parameters, owners, patch_state


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    eps: float | None = None,
) -> list[dict[str, Any]]:
    """Give an optimizer's parameter groups for a patched model, with the rates of its method.

    The rates are those of the method's ``learning_rates``; gates are not decayed. A SoRA's d = s g
    moves s times as fast as its gates g would, and has ``eps`` over s, so that under Adam the
    trajectory is that of g. Everything else goes in one group.

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
    config = patch_state(model).config
    rates: dict[int, Rate] = {}
    for _, owner in owners(model):
        for name, rate in config.learning_rates(owner.place).items():
            rates[id(owner.own_tensors()[name])] = rate
    if gate_lr is not None and not any(rate.gate for rate in rates.values()):
        raise ValueError(
            f"gate_lr: expected None for {type(config).__name__} without gates, got {gate_lr}."
        )
    found: dict[Rate, list[nn.Parameter]] = {}
    for parameter in adapter_parameters(model):
        if parameter.requires_grad:
            found.setdefault(rates.get(id(parameter), Rate()), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for rate, parameters in found.items():
        base = gate_lr if rate.gate and gate_lr is not None else lr
        decay = weight_decay * rate.weight_decay
        group = {"params": parameters, "lr": base * rate.lr, "weight_decay": decay}
        groups.append(group if eps is None else {**group, "eps": eps * rate.eps})
    return groups
