"""What a patched model remembers of its patch, and how its layers are found again."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from rasa_ext.config import RasaConfig
from rasa_ext.modules import RasaLinear
from rasa_ext.targets import Plan

_RECORD = "_rasa_ext"


@dataclasses.dataclass
class Record:
    """What a patched model remembers of its patch: enough to report it and to undo it."""

    config: RasaConfig
    plan: Plan
    trainable_before: frozenset[str]
    attributes_before: list[tuple[nn.Module, str, Any]]
    """Attributes of modules that were changed: (module, name, value before)."""
    hooks: list[Any]
    merged: float | None = None
    """The largest change of any weight while merged, None while not."""
    dense_dtype: torch.dtype | None = None
    """What the last merge was asked to make of quantized weights."""
    subtract: bool = False
    """Whether the last merge was asked to keep no copy of the base's weights."""


def unwrap(model: nn.Module) -> nn.Module:
    """The patched module inside the wrappers of torch.compile and data parallelism."""
    while isinstance(model, nn.Module) and _RECORD not in model.__dict__:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch_model`` or ``load_adapter`` has patched this very module."""
    return isinstance(model, nn.Module) and _RECORD in unwrap(model).__dict__


def record_of(model: nn.Module) -> Record:
    """The record of a patched model; ValueError where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    record = unwrap(model).__dict__.get(_RECORD)
    if record is None:
        raise ValueError(
            "model: expected a model that rasa_ext.patch_model patched, got an unpatched "
            f"{type(model).__name__}; if only a part of it was patched, pass that part."
        )
    return record


def rasa_layers(model: nn.Module) -> list[tuple[str, RasaLinear]]:
    """``(name, layer)`` of every RasaLinear, each once, in module order."""
    return [
        (name, module)
        for name, module in unwrap(model).named_modules()
        if isinstance(module, RasaLinear)
    ]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A, B and d of every layer and A and B of every pool, each once.

    What optimisers take, unless ``modules_to_save`` are trained too: then take every parameter
    with ``requires_grad``.
    """
    record_of(model)
    found: dict[int, nn.Parameter] = {}
    for _, layer in rasa_layers(model):
        pool = () if layer.pool is None else (layer.pool.A, layer.pool.B)
        for parameter in (layer.A, layer.B, layer.d, *pool):
            found.setdefault(id(parameter), parameter)
    return list(found.values())


def repack(model: nn.Module) -> None:
    """Forget cached packs, and bring those that captured CUDA graphs read up to date, in place.

    Forwards see every change of a parameter by themselves, except one through ``.data``. A CUDA
    graph captured after a forward without grad replays over the packs of that time: call this
    after training on, before the next replay.
    """
    record_of(model)
    for _, layer in rasa_layers(model):
        layer.repack()


def set_record(model: nn.Module, record: Record | None) -> None:
    """Mark a module as patched, or with None as unpatched."""
    if record is None:
        del model.__dict__[_RECORD]
    else:
        model.__dict__[_RECORD] = record
