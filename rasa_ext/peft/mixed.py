"""Batches whose rows go through adapters of their own: PEFT's ``adapter_names`` of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.utils.other import AuxiliaryTrainingWrapper

if TYPE_CHECKING:
    from torch import nn

    from rasa_ext.peft.model import RasaModel

BASE = "__base__"
"""PEFT's name for a row that goes through no adapter."""


@dataclass(frozen=True)
class Rows:
    """The adapter of each row of a batch, whose rows beam search repeats ``beams`` times."""

    names: tuple[str, ...]
    beams: int = 1

    def of(self, rows: int) -> list[str]:
        """The adapter of each of ``rows`` rows; an encoder's are not repeated.

        Raises ValueError where the numbers do not fit.
        """
        for repeat in (1, self.beams):
            if rows == len(self.names) * repeat:
                return [name for name in self.names for _ in range(repeat)]
        raise ValueError(
            f"adapter_names: expected one name for each row of a layer's input, got "
            f"{len(self.names)} names for {rows} rows; a layer that sees tokens of several rows as "
            "one batch, as those of experts do, cannot tell them apart."
        )


@contextlib.contextmanager
def rows_through(model: RasaModel, names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """Within the context row i of every layer's input goes through the adapter ``names[i]``.

    Raises TypeError or ValueError, saying what was expected, before anything is computed.
    """
    rows = Rows(_checked(model, names), beams)
    handles = [
        module.register_forward_pre_hook(_with_names(rows), with_kwargs=True)
        for module in model.model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    layers = model.layers()
    try:
        for layer in layers:
            layer.rows = rows
        yield
    finally:
        for layer in layers:
            layer.rows = None
        for handle in handles:
            handle.remove()


def _checked(model: RasaModel, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names: expected a list with a name for each row, got {names!r}.")
    if model.training:
        raise ValueError(
            "adapter_names: a batch of several adapters is for inference; call model.eval() first."
        )
    if any(layer.merged for layer in model.layers()):
        raise ValueError(
            "adapter_names: an adapter is merged into the base weights, which all rows share; "
            "call model.unmerge_adapter() first."
        )
    if unknown := sorted(set(names) - {BASE, *model.peft_config}):
        raise ValueError(
            f"adapter_names: expected some of {BASE}, {', '.join(model.peft_config)}, got "
            f"{', '.join(unknown)}."
        )
    return tuple(names)


def _with_names(rows: Rows) -> Any:
    """A hook that hands PEFT's wrapper of a module trained in full the names of its rows."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        known = module._get_available_adapters()
        names = [name if name in known else BASE for name in rows.of(len(args[0]))]
        return args, {**kwargs, "adapter_names": names}

    return hook
