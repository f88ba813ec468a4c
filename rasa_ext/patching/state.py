"""State of a patched model, and lookup of its adapted layers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from rasa_ext.methods.base import AdapterConfig
from rasa_ext.nn.adapter import AdaptedModule
from rasa_ext.nn.rasa import AdapterOwner, RasaLinear, RasaPool
from rasa_ext.nn.rasa_experts import RasaExperts
from rasa_ext.patching.targets import Plan
from rasa_ext.patching.tokens import row_owners

STATE = "_rasa_ext"
_INNER = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""Attribute names under which torch.compile, data parallelism and FSDP 1 hold the inner module."""

_Module = TypeVar("_Module", bound=nn.Module)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_clock = itertools.count()
_stepped: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""When an optimizer stepped a parameter, by ``_clock``."""
_counts: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class PatchState:
    """State of a patched model: what ``summary`` reports and ``unpatch`` needs."""

    plan: Plan
    trainable_before: frozenset[str]
    attributes_before: list[tuple[nn.Module, str, Any]]
    """Module attributes that were changed: (module, name, value before)."""
    hooks: list[Any]
    merged: float | None = None
    """Largest change of any weight while merged; None while not merged."""
    dense_dtype: torch.dtype | None = None
    """Dtype that the last merge was asked to give dequantized weights."""
    merged_of: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Checksums of the adapter's parameters at the last merge, by name."""
    replaced: dict[nn.Parameter, Tensor] = dataclasses.field(default_factory=dict)
    """Parameters of the base that a loaded adapter brought, with the base's values."""
    since: int = dataclasses.field(default_factory=functools.partial(next, _clock))
    """When the model was patched, by ``_clock``."""
    disabled: int = 0
    """Number of open ``disable_adapter`` contexts."""
    merge_again: bool = False
    """Whether the model was merged when the first of them was entered."""

    @property
    def config(self) -> AdapterConfig:
        """The adapter's config."""
        return self.plan.config


def _note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Note what an optimizer steps first, or after a group was added."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _counts.get(optimizer) != count:
        _counts[optimizer], now = count, next(_clock)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _stepped[parameter] = now


register_optimizer_step_pre_hook(_note)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the patched module inside the wrappers of torch.compile and data parallelism.

    Args:
        model: a model, wrapped or not.

    Returns:
        The patched module; without one, the innermost module.

    Example:
        >>> wrapped = torch.nn.DataParallel(rasa_ext.patch_model(model, rank=8, k=1))
        >>> rasa_ext.patching.unwrap(wrapped) is model
        True
    """
    while isinstance(model, nn.Module) and STATE not in model.__dict__:
        inner = next((model._modules[name] for name in _INNER if name in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def inner_name(name: str) -> str:
    """Return a name as if nothing were wrapped, neither the model nor parts of it."""
    name = re.sub(rf"^(({'|'.join(_INNER)})\.)+", "", name)
    return re.sub(r"(?<=\.)(_orig_mod|_(fsdp|checkpoint)_wrapped_module)\.", "", f".{name}")[1:]


def is_patched(model: nn.Module) -> bool:
    """Return whether ``patch_model`` or ``load_adapter`` patched this very module."""
    return isinstance(model, nn.Module) and STATE in unwrap(model).__dict__


def patch_state(model: nn.Module) -> PatchState:
    """Return the state of a patched model; raise ValueError if the model is not patched."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    state: PatchState | None = unwrap(model).__dict__.get(STATE)
    if state is None:
        way_out = (
            "call PEFT's methods: print_trainable_parameters(), save_pretrained(directory), "
            "merge_adapter()."
            if hasattr(model, "peft_config")
            else "if only a part of it was patched, pass that part."
        )
        raise ValueError(
            "model: expected a model that rasa_ext.patch_model patched, got an unpatched "
            f"{type(model).__name__}; {way_out}"
        )
    return state


def check_unmerged(model: nn.Module) -> None:
    """Check that a model's adapter is not merged, and so may change.

    Args:
        model: a patched model.

    Raises:
        TypeError, ValueError: the model is no module, or not patched.
        RuntimeError: the adapter is merged.

    Example:
        >>> rasa_ext.patching.check_unmerged(rasa_ext.patch_model(model, rank=8, k=1))
    """
    if patch_state(model).merged is not None:
        raise RuntimeError("model: call rasa_ext.unmerge(model) before changing the adapter.")


def check_merge_is_current(root: nn.Module) -> None:
    """Raise RuntimeError if a merged adapter has changed since the merge."""
    state = patch_state(root)
    if state.merged is None:
        return
    now = adapter_checksums(root)
    merged = {name: (now[name], then) for name, then in state.merged_of.items() if name in now}
    if changed := [name for name, (a, b) in merged.items() if a.item() != b.item()]:
        raise RuntimeError(
            f"model: the adapter changed while it is merged ({changed[0]}, one of {len(changed)}); "
            "call rasa_ext.unmerge(model), then merge or save again."
        )


def adapter_checksums(root: nn.Module) -> dict[str, Tensor]:
    """Return a checksum () of every adapter parameter by name, without waiting for the device."""
    adapters = parameters_of_adapters(root)
    return {
        name: p.detach().contiguous().view(_BITS[p.itemsize]).sum(dtype=torch.int64)
        for name, p in root.named_parameters()
        if p in adapters
    }


def adapted_layers(model: nn.Module) -> list[tuple[str, RasaLinear]]:
    """List ``(name, layer)`` of every RasaLinear, each once, in module order."""
    return _modules_of(model, RasaLinear)


def adapted_experts(model: nn.Module) -> list[tuple[str, RasaExperts]]:
    """List ``(name, experts)`` of every RasaExperts, each once, in module order."""
    return _modules_of(model, RasaExperts)


def owners(model: nn.Module) -> list[tuple[str, AdapterOwner]]:
    """List the owners of adapter tensors: adapted linear layers and adapted expert weights.

    Args:
        model: a model, patched or not.

    Returns:
        Pairs of a name and an owner, in the model's order. An owner is a ``RasaLinear``, or the
        adapter of one stacked expert weight. Each has ``config``, ``spec``, ``pool``,
        ``own_tensors()`` and ``pool_tensors()``.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> name, owner = rasa_ext.patching.owners(model)[0]
        >>> list(owner.own_tensors()), list(owner.pool_tensors())
        (['A', 'B', 'd'], ['A', 'B'])
    """
    return _modules_of(model, AdapterOwner)


def pools(model: nn.Module) -> list[RasaPool]:
    """List the pools of a model, in the order of groups."""
    return list(dict.fromkeys(owner.pool for _, owner in owners(model) if owner.pool is not None))


def _modules_of(model: nn.Module, kind: type[_Module]) -> list[tuple[str, _Module]]:
    modules = unwrap(model).named_modules()
    return [(inner_name(name), module) for name, module in modules if isinstance(module, kind)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the adapter's trainable parameters, each once: A, B and d of layers, A and B of pools.

    Rows of ``trainable_token_indices`` come last. Pass the list to an optimizer. If
    ``modules_to_save`` are trained too, pass every parameter with ``requires_grad`` instead.

    Args:
        model: a patched model.

    Returns:
        The parameters, in the order of the model's layers, in the config's ``adapter_dtype``.
        A layer has A (r-k, in), B (out, r-k) and d (r-k+L*k,), a pool A (L*k, in) and B (out, L*k)
        (arXiv 2503.12576, section 3).

    Raises:
        TypeError, ValueError: the model is no module, or not patched.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=5e-4)
    """
    patch_state(model)
    parameters: dict[int, nn.Parameter] = {}
    for _, owner in owners(model):
        for tensor in owner.adapter().sources():
            if isinstance(tensor, nn.Parameter):
                parameters.setdefault(id(tensor), tensor)
    parameters.update((id(module.rows), module.rows) for _, module in row_owners(unwrap(model)))
    return list(parameters.values())


def parameters_of_adapters(model: nn.Module) -> dict[nn.Parameter, None]:
    """Return every adapter parameter, trained or not; each once, in the order of layers."""
    parameters: dict[nn.Parameter, None] = {}
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            base = set(module.base_layer.parameters())
            pools = (tensor for adapter in module.adapters() for tensor in adapter.pool.values())
            mine = (*module.parameters(), *(t for t in pools if isinstance(t, nn.Parameter)))
            parameters.update(dict.fromkeys(p for p in mine if p not in base))
    return parameters


def trained_by_hand(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters, by name, that the user unfroze after patching, such as norms.

    Those that were trained and then frozen again, as code for evaluation does, are among them.
    """
    known, state = set(parameters_of_adapters(root)), patch_state(root)
    for name in state.plan.modules_to_save:
        known.update(root.get_submodule(name).parameters())
    named = root.named_parameters()
    return {
        inner_name(n): p
        for n, p in named
        if (p.requires_grad or _stepped.get(p, -1) > state.since) and p not in known
    }
