"""The weights that PEFT may adapt, by their names in the plain model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from rasa_ext.base_layers.linear import is_linear
from rasa_ext.base_layers.survey import LinearBase, StackedBase, stacked_bases
from rasa_ext.patching.swap import replace_modules
from rasa_ext.patching.targets import check_base
from rasa_ext.peft.config import RasaConfig
from rasa_ext.peft.experts import RasaPeftExperts
from rasa_ext.peft.layer import RasaPeftLinear

HOW = "rasa_experts='shared', or 'slot' or 'layer' ('own' for the method lora)"


def bases_of(model: nn.Module) -> tuple[dict[str, LinearBase], dict[str, StackedBase]]:
    """Return a model's linear layers and stacked weights by name, adapted or not.

    An adapted weight goes by the name of the layer or experts in its place. Modules that PEFT
    trains in full are left out.
    """
    linears: dict[str, LinearBase] = {}
    stacks: dict[str, StackedBase] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        base = module
        if isinstance(module, RasaPeftLinear | RasaPeftExperts | AuxiliaryTrainingWrapper):
            inside += (f"{path}.",)
            base = getattr(module, "base_layer", module)
        if is_linear(base):
            linears[path] = LinearBase(base)
        stacks |= stacked_bases(path, base)
    return linears, stacks


def experts_of(model: nn.Module) -> list[RasaPeftExperts]:
    """List the experts that can have adapters, in the model's order."""
    return [module for module in model.modules() if isinstance(module, RasaPeftExperts)]


def wrap_experts(model: nn.Module, chosen: Mapping[str, StackedBase]) -> None:
    """Prepare stacked weights for adapters, so that PEFT can match them by name like layers.

    Raises TypeError or ValueError, before anything changes, if one cannot be adapted.
    """
    wrapped = {experts.base_layer: experts for experts in experts_of(model)}
    for name, stack in chosen.items():
        check_base(name, stack)
    for stack in chosen.values():
        if (base := stack.module) not in wrapped:
            wrapped[base] = RasaPeftExperts(base)
            replace_modules(model, {base: wrapped[base]})
        wrapped[base].add_stack(stack.key)


def unwrap_experts(model: nn.Module) -> None:
    """Unwrap experts that have no adapter, for example after an error while adding one."""
    for experts in experts_of(model):
        for name, stack in experts.stacks().items():
            if not stack.configs:
                del experts._modules[name]
        if not experts.stacks():
            replace_modules(model, {experts: experts.base_layer})


def trained_in_full(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return an adapter's copies of modules that are trained in full, by module name."""
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    copies: dict[str, Any] = {name: each.modules_to_save for name, each in wrappers.items()}
    return {name: each[adapter_name] for name, each in copies.items() if adapter_name in each}


def untouched(stacks: Mapping[str, StackedBase]) -> str:
    """Return a warning that stacked weights stay untouched, and how to adapt them."""
    shown = ", ".join(f"{name} {stack.shape}" for name, stack in list(stacks.items())[:3])
    return (
        f"rasa_experts: {len(stacks)} stacked (3-D) weights stay untouched, among them {shown}. "
        f"To adapt them, pass {HOW}."
    )


def chosen_stacks(
    model: nn.Module, config: RasaConfig, is_target: Callable[[str], bool]
) -> dict[str, StackedBase]:
    """Return the stacked weights that an adapter changes, by name.

    Args:
        model: a model, adapted or not.
        config: the config; with ``rasa_experts`` None it selects none.
        is_target: returns whether ``target_modules`` matches a layer.

    Raises:
        ValueError: no weight fits both arguments.
    """
    linears, stacks = bases_of(model)
    named = {name: stack for name, stack in stacks.items() if is_target(name)}
    targets = config.target_modules
    if config.rasa_experts is None:
        if named and not any(map(is_target, linears)):
            raise ValueError(
                f"target_modules: {targets!r} names only stacked expert weights, such as "
                f"{next(iter(named))!r}; to adapt them, pass {HOW}."
            )
        return {}
    if not stacks:
        raise ValueError(
            "rasa_experts: expected a model with stacked experts in a layout that transformers 5 "
            "marks, found none; leave out rasa_experts."
        )
    if not named:
        raise ValueError(
            f"rasa_experts: expected target_modules that name stacked weights, such as "
            f"{next(iter(stacks))!r}, but {targets!r} names none; add them, or leave out "
            "rasa_experts."
        )
    return named
