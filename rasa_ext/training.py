"""Helpers for training loops: parameter groups, new tensors, steps between Trainer's steps."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rasa_ext.base_layers.sharded import is_sharded
from rasa_ext.methods.base import AdapterConfig, Rate
from rasa_ext.nn.adapter import adapted_modules, drop_packs
from rasa_ext.nn.rasa import RasaLinear, RasaPool
from rasa_ext.patching.state import (
    adapted_layers,
    check_unmerged,
    owners,
    patch_state,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["adapter_of", "parameter_groups", "replace_tensors", "step_callback"]

Config = TypeVar("Config", bound=AdapterConfig)


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    eps: float | None = None,
    loraplus_lr_ratio: float = 1.0,
    d_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, with the method's rates and LoRA+'s.

    The method's rates come from ``AdapterConfig.learning_rates``. All other parameters that are
    trained share one group, those of ``modules_to_save`` as well.

    Args:
        model: a patched model, or PEFT's model of an adapter of this package.
        lr: the learning rate.
        weight_decay: weight decay of parameters without a rate of their own.
        eps: Adam's eps for all groups. Defaults to the optimizer's.
        loraplus_lr_ratio: factor on the rate of B and of the pool's B (LoRA+, arXiv 2402.12354).
        d_lr_ratio: factor on the rate of the diagonal d.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and, if given, ``eps``. No group is empty.

    Raises:
        TypeError, ValueError: the model is no module, or has no such adapter, or no trained tensor
            has the name to which a ratio applies.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> groups = rasa_ext.training.parameter_groups(model, lr=5e-4)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    ratios = {"B": loraplus_lr_ratio, "d": d_lr_ratio}
    rates: dict[Any, Rate] = {}
    trained: set[str] = set()
    for adapter in (adapter for module in adapted_modules(model) for adapter in module.adapters()):
        own = cast(AdapterConfig, adapter.config).learning_rates(adapter.spec)
        tensors = [(name, tensor, own.get(name, Rate())) for name, tensor in adapter.own.items()]
        tensors += [(name, tensor, Rate()) for name, tensor in adapter.pool.items()]
        for name, tensor, rate in tensors:
            rates[tensor] = rate._replace(lr=rate.lr * ratios.get(name, 1.0))
            trained |= {name} if tensor.requires_grad else set()
    for argument, name in (("loraplus_lr_ratio", "B"), ("d_lr_ratio", "d")):
        if ratios[name] != 1 and name not in trained:
            raise ValueError(f"{argument}: expected 1, since no trained tensor is called {name!r}.")
    by_rate: dict[Rate, list[nn.Parameter]] = {}
    for parameter in dict.fromkeys([*rates, *model.parameters()]):
        if parameter.requires_grad:
            by_rate.setdefault(rates.get(parameter, Rate()), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for rate, parameters in by_rate.items():
        decay = weight_decay * rate.weight_decay
        group = {"params": parameters, "lr": lr * rate.lr, "weight_decay": decay}
        groups.append(group if eps is None else {**group, "eps": eps * rate.eps})
    return groups


def adapter_of(model: nn.Module, *methods: type[Config]) -> tuple[Config, dict[str, RasaLinear]]:
    """Return the config of a patched model and the adapted linear layers.

    Args:
        model: a patched model.
        methods: the expected config classes.

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
        raise ValueError(f"model: expected a patch with {expected}, got {type(config).__name__}.")
    return config, dict(adapted_layers(model))


@torch.no_grad()
def replace_tensors(
    model: nn.Module,
    config: AdapterConfig,
    tensors: Mapping[RasaLinear | RasaPool, Mapping[str, Tensor]],
) -> None:
    """Replace tensors of layers and pools, and set a config that makes tensors of these shapes.

    Parameters are trained from then on; other tensors become buffers. With several processes, call
    this on the model inside DistributedDataParallel, on every process, and wrap the model again.

    Args:
        model: a patched model.
        config: the model's new config.
        tensors: by name, all new tensors of each layer and each pool that changes.

    Raises:
        TypeError, ValueError: the model is no module, or not patched; or there are new parameters,
            and the model is in DistributedDataParallel, or is sharded. The model is then unchanged.
        RuntimeError: the adapter is merged.

    Example:
        >>> import dataclasses
        >>> config = rasa_ext.methods.LoraConfig(rank=2, target_modules=["up_proj"])
        >>> model = rasa_ext.patch_model(model, config=config)
        >>> config, layers = rasa_ext.training.adapter_of(model, rasa_ext.methods.LoraConfig)
        >>> later = dataclasses.replace(config, rank=3)
        >>> larger = {layer: later.layer_tensors(layer.spec) for layer in layers.values()}
        >>> rasa_ext.training.replace_tensors(model, later, larger)
        >>> {row.R for row in rasa_ext.summary(model)}
        {3}
    """
    check_unmerged(model)
    if any(
        isinstance(tensor, nn.Parameter)
        and all(tensor is not old for old in owner.tensors().values())
        for owner, own in tensors.items()
        for tensor in own.values()
    ):
        _check_unwrapped(model)
    state = patch_state(model)
    state.plan = dataclasses.replace(state.plan, config=config)
    for _, layer in owners(model):
        layer.config = config
    for owner, own in tensors.items():
        owner.replace(own)
    drop_packs(model)


def _check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for an engine, which does not train new parameters.

    An engine around the model cannot be seen, so in several processes a warning is given.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()) or any(
        map(is_sharded, model.parameters())
    ):
        raise ValueError(
            "model: expected the model inside DistributedDataParallel, not sharded, since engines "
            "do not train new parameters; pass model.module on every process, then wrap it again."
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "model: it has new parameters, whose gradients an earlier DistributedDataParallel does "
            "not average; wrap the model again.",
            stacklevel=3,
        )


def step_callback(
    steps: Any,
    before: Callable[[], object] = lambda: None,
    end: Callable[[], str] | None = None,
) -> TrainerCallback:
    """Make a callback of transformers' Trainer that runs extra steps and saves their state.

    Args:
        steps: an object with ``step``, called after each optimizer step, ``state_dict``, which
            returns numbers and strings, and ``load_state_dict``.
        before: called before each optimizer step, when gradients are available.
        end: called at the end, unless training was stopped early; the returned text is printed.

    Returns:
        The callback, to pass to Trainer, or to return from ``AdapterConfig.callbacks``.

    Raises:
        ValueError: a resumed checkpoint has no state of one such callback.

    Example:
        >>> class Count:
        ...     steps = 0
        ...
        ...     def step(self):
        ...         self.steps += 1
        ...
        ...     def state_dict(self):
        ...         return {"steps": self.steps}
        ...
        ...     def load_state_dict(self, state):
        ...         self.steps = state["steps"]
        >>> callback = rasa_ext.training.step_callback(Count())
        >>> callback.state()["attributes"]
        {'saved': {'steps': 0}}
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    name = f"{type(steps).__name__}Callback"

    class StepCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # untyped
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"saved": steps.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.global_step:
                return
            saved = state.stateful_callbacks.get(name)
            if not isinstance(saved, dict):
                raise ValueError(
                    "resume_from_checkpoint: expected a checkpoint of a training with one callback "
                    f"of {type(steps).__name__}, like this training, got one with none or several."
                )
            steps.load_state_dict(saved["attributes"]["saved"])

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            before()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if end is not None and state.global_step >= state.max_steps:
                text = end()
                if state.is_world_process_zero:
                    print(text)

    StepCallback.__name__ = name  # Trainer stores the state under this name
    return StepCallback()
