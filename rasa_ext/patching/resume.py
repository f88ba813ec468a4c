"""Refusal of training checkpoints whose parameters have older names, or another order."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_INSTEAD = (
    "an optimizer's state would go to other parameters. Load the adapter's file alone, and train "
    "from there with a new optimizer, or finish the training with the older version"
)


def refuse_older(keys: Mapping[str, Any], older: tuple[str, ...]) -> None:
    """Raise ValueError if a state dict has names of older versions.

    Args:
        keys: the state dict.
        older: how such names begin.
    """
    if found := next((key for key in keys if key.startswith(older)), None):
        raise ValueError(
            f"state_dict: {found!r} is a name of an older rasa_ext, in which parameters had "
            f"another order: {_INSTEAD}."
        )


def _check_moments(optimizer: Optimizer, *_: Any) -> None:
    """Raise ValueError before the first step if moments were loaded for parameters of other shapes.

    Fused kernels do not compare shapes, and would write outside of the memory of the moments.
    """
    if optimizer in _known or not type(optimizer).__module__.startswith("torch.optim"):
        return
    for parameter, state in optimizer.state.items():
        for name in _MOMENTS:
            moment = state.get(name)
            if isinstance(moment, Tensor) and moment.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: expected {name} of shape {tuple(parameter.shape)} for a "
                    f"parameter, got {tuple(moment.shape)}; if an older rasa_ext wrote the "
                    f"checkpoint, {_INSTEAD}."
                )
    _known.add(optimizer)


register_optimizer_step_pre_hook(_check_moments)
