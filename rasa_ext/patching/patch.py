"""Patching a model in place, and undoing the patch."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import is_linear, linear_shape
from rasa_ext.base_layers.survey import (
    Base,
    LinearBase,
    StackedBase,
    base_of,
    home_of,
    is_container,
)
from rasa_ext.methods.base import AdapterConfig
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.packs import Decoding, PackSet
from rasa_ext.nn.rasa import ContainerPool, RasaLinear, RasaPool, SplitRasaLinear
from rasa_ext.nn.rasa_experts import RasaExperts, RasaExpertWeight
from rasa_ext.nn.trained_tokens import TrainedTokens
from rasa_ext.patching.resume import refuse_older
from rasa_ext.patching.state import STATE, PatchState, owners, patch_state, pools, unwrap
from rasa_ext.patching.swap import (
    link_layers,
    prepare_model,
    remove_children,
    replace_modules,
    require_grad,
    undo,
)
from rasa_ext.patching.targets import Plan, make_plan, suffixes
from rasa_ext.patching.tokens import make_modules


def check_unpatched(model: nn.Module) -> None:
    """Check that a model has no RaSA layers; warn about PEFT's, which patching freezes.

    Args:
        model: the model to check.

    Raises:
        ValueError: the model is patched already.

    Example:
        >>> rasa_ext.patching.check_unpatched(model)
    """
    modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
    for name, module in modules:
        if isinstance(module, RasaLinear | RasaExperts):
            raise ValueError(
                f"model: expected an unpatched model, but {name!r} is a {type(module).__name__} "
                "already; call rasa_ext.unpatch(model) or rasa_ext.merge_and_unload(model) first."
            )
    for name, module in modules:
        if hasattr(module, "base_layer") and any(p.requires_grad for p in module.parameters()):
            warnings.warn(
                f"model: {name!r} is adapted by PEFT ({type(module).__name__}), and patching "
                "freezes that adapter; to train both, set requires_grad of its parameters after "
                "patching, else call unload() or merge_and_unload() of the PEFT model first.",
                stacklevel=4,
            )
            return


def plan_layers(
    model: nn.Module, config: RasaConfig, shapes: Mapping[str, tuple[int, int]], where: str
) -> Plan:
    """Plan an adapter for exactly these layers.

    Args:
        model: an unpatched model.
        config: the config whose ``target_modules`` are replaced.
        shapes: (out, in) by the layer's name in ``model.named_modules()``.
        where: start of errors about ``shapes``.

    Returns:
        The plan, with the new targets in ``config``.

    Raises:
        ValueError: the model is patched, or a name is no linear layer of the given shape.

    Example:
        >>> shapes = {"model.layers.0.mlp.down_proj": (32, 48)}
        >>> config = rasa_ext.RasaConfig(rank=8, k=1)
        >>> plan = rasa_ext.patching.plan_layers(model, config, shapes, "shapes")
        >>> [group.names for group in plan.groups]
        [('model.layers.0.mlp.down_proj',)]
    """
    check_unpatched(model)
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            got = "not in the model" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{where}: expected names of linear layers, but {name!r} is {got}.")
        if shape != linear_shape(module):
            raise ValueError(
                f"{where}: expected (out, in) {linear_shape(module)} for {name!r}, got {shape}."
            )
    exact = "|".join(re.escape(name) for name in shapes)
    for targets in (tuple(suffixes(list(shapes), model)), exact):
        plan = make_plan(model, dataclasses.replace(config, target_modules=targets))
        if {name for group in plan.groups for name in group.names} == set(shapes):
            break
    return plan


def apply_plan(model: nn.Module, plan: Plan, new: bool = True) -> PatchState:
    """Apply a plan that ``make_plan`` made for this model; return the state of the patched model.

    A ``new`` adapter is not about to be loaded from a file.
    """
    config = plan.config
    # Everything that can fail, including running out of memory, happens before the model changes.
    wrapped: dict[nn.Module, RasaLinear] = {}
    stacked: dict[nn.Module, dict[str, RasaExpertWeight]] = {}
    pools: list[tuple[RasaPool, str]] = []
    decoding = Decoding()
    for group in plan.groups:
        bases = {name: base_of(model, name, group.experts) for name in group.names}
        specs = group.specs(*(base.device for base in bases.values()))
        tensors = config.group_tensors(specs)
        names = [name.rpartition(".")[0] if group.experts else name for name in group.names]
        home = home_of(model, names)
        kind_of_pool = ContainerPool if is_container(model.get_submodule(home)) else RasaPool
        pool, packs = kind_of_pool(tensors) if tensors else None, PackSet(decoding)
        pools += [(pool, home)] if pool else []
        for base, spec in zip(bases.values(), specs, strict=True):
            owner: RasaExpertWeight | RasaLinear
            if isinstance(base, StackedBase):
                owner = RasaExpertWeight(config, spec, pool, packs)
                stacked.setdefault(base.module, {})[base.key] = owner
            else:
                kind = RasaLinear if base.split is None else SplitRasaLinear
                owner = wrapped[base.module] = kind(base.module, config, spec, pool, packs)
                owner.is_dense_head = spec.name == plan.dense_head
            if new:
                start_from_weight(config, owner.adapter(), base)
    experts = {module: RasaExperts(module, stacks) for module, stacks in stacked.items()}
    tokens = make_modules(model, plan.tokens, config.adapter_dtype)
    state = PatchState(
        plan=plan,
        trainable_before=frozenset(n for n, p in model.named_parameters() if p.requires_grad),
        attributes_before=prepare_model(model, wrapped, hide_quantizer=True),
        hooks=require_grad(model, plan.inputs),
    )
    model.requires_grad_(False)
    replace_modules(model, {**wrapped, **experts, **tokens})
    numbers: Counter[str] = Counter()
    for pool, home in pools:
        name, module = f"rasa_pool_{numbers[home]}", model.get_submodule(home)
        numbers[home] += 1
        if isinstance(pool, ContainerPool):
            pool.register(module, f"{name}_")
        else:
            module.add_module(name, pool)
    link_layers(model, RasaLinear)
    for name in plan.modules_to_save:
        for parameter in model.get_submodule(name).parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    model.__dict__[STATE] = state
    state.hooks += [
        *decoding.watch(model),
        *(
            module.register_load_state_dict_pre_hook(_restore)
            for module in {model, *map(model.get_submodule, numbers)}
        ),
    ]
    return state


@torch.no_grad()
def start_from_weight(config: AdapterConfig, adapter: Adapter, base: Base) -> None:
    """Call ``config.begin`` for a layer, if the method has it.

    Raises:
        ValueError: the base's weight cannot be read, or a tensor is not finite afterwards.
    """
    own, spec = adapter.own, adapter.spec
    if type(config).begin is AdapterConfig.begin or any(tensor.is_meta for tensor in own.values()):
        return
    split = isinstance(base, LinearBase) and base.split is not None
    weight = None if split else _unmerged(base, getattr(adapter.owner, "merged_base", None))
    if weight is None or weight.is_meta or not weight.is_floating_point():
        raise ValueError(
            f"config: expected a base whose weights can be read, since {config.method!r} begins "
            f"with them, but {spec.name!r} is split over processes, offloaded, or a stack of "
            "packed experts; make and save the adapter over a whole model, then load it."
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    config.begin(own, adapter.pool, spec, weight.to(wide, copy=True))
    for name, tensor in (*own.items(), *adapter.pool.items()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"config: {config.method!r} begins with NaN or infinity in {name} of {spec.name!r}."
            )


def _unmerged(base: Base, before: Any) -> Tensor:
    """Return a base's weight without the adapters that are merged, given what unmerging needs."""
    if isinstance(before, nn.Module):  # the quantized layer
        return LinearBase(cast(nn.Linear, before)).values()
    if isinstance(before, dict):
        return torch.stack([weight for _, weight in sorted(before.items())])
    return base.values() if before is None else before


def _restore(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Load pools without rounding, as ``AdaptedModule`` loads other tensors: a hook."""
    layers = (f"{prefix}{name}.pool." for name, _ in owners(module))
    refuse_older(state_dict, (f"{prefix}rasa_pools.", *layers))
    for each in module.modules():
        if isinstance(each, AdaptedModule):
            each.restore()


def remove_layers(model: nn.Module) -> nn.Module:
    """Put every base layer back in place, with the current weights."""
    root, state = unwrap(model), patch_state(model)
    kinds = RasaLinear | RasaExperts | TrainedTokens
    adapted = [module for module in root.modules() if isinstance(module, kinds)]
    for pool in pools(root):
        if isinstance(pool, ContainerPool):
            pool.release()
    remove_children(root, RasaPool)
    replace_modules(root, {module: module.base_layer for module in adapted})
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in state.trainable_before)
    undo(state.attributes_before)
    for hook in state.hooks:
        hook.remove()
    del root.__dict__[STATE]
    return model
