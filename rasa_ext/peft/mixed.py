"""Batches with one adapter per row: PEFT's ``adapter_names`` of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from rasa_ext.peft.experts import RasaPeftExpertWeight
from rasa_ext.peft.named import NamedAdapters, RowAdapters

BASE = "__base__"
"""PEFT's name for a row without an adapter."""

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def rows_through(
    layers: Sequence[NamedAdapters],
    wrappers: Sequence[AuxiliaryTrainingWrapper],
    names: Sequence[str],
    known: Collection[str],
    beams: int = 1,
) -> Iterator[RowAdapters]:
    """Within the context, send row i of every layer's input through adapter ``names[i]``.

    Args:
        layers: adapter owners of one model.
        wrappers: PEFT's wrappers of modules that are trained in full.
        names: one name per row of a batch; ``BASE`` for no adapter.
        known: the model's adapters.
        beams: how often beam search repeats each row.

    Raises:
        TypeError, ValueError: an argument is wrong; raised before anything is computed.
    """
    rows = RowAdapters(_checked(layers, names, known), beams)
    hook = _with_names(rows)
    handles = [each.register_forward_pre_hook(hook, with_kwargs=True) for each in wrappers]
    try:
        for layer in layers:
            layer.rows = rows
        yield rows
    finally:
        for layer in layers:
            layer.rows = None
        for handle in handles:
            handle.remove()


def _checked(
    layers: Sequence[NamedAdapters], names: Sequence[str], known: Collection[str]
) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names: expected a list with a name for each row, got {names!r}.")
    if any(layer.training for layer in layers):
        raise ValueError(
            "adapter_names: a batch of several adapters is for inference; call model.eval() first."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "adapter_names: an adapter is merged into the base weights, which all rows share; "
            "call model.unmerge_adapter() first."
        )
    if unknown := sorted(set(names) - {BASE, *known}):
        raise ValueError(
            f"adapter_names: expected some of {BASE}, {', '.join(known)}, got {', '.join(unknown)}."
        )
    experts = (layer for layer in layers if isinstance(layer, RasaPeftExpertWeight))
    if stuck := {name for layer in experts for name in names if name in layer.configs}:
        raise ValueError(
            f"adapter_names: expected adapters of linear layers, but {', '.join(sorted(stuck))} "
            "adapts experts, which see tokens of all rows as one batch and cannot tell them apart; "
            "run the rows of one adapter at a time, with model.set_adapter(name)."
        )
    return tuple(names)


def _with_names(rows: RowAdapters) -> Callable[..., _Arguments]:
    """Make a hook that passes the rows' names to PEFT's wrapper of a module trained in full."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        wrapper: Any = module
        known = wrapper._get_available_adapters()
        names = [name if name in known else BASE for name in rows.of(len(args[0]))]
        return args, {**kwargs, "adapter_names": names}

    return hook
