"""Adapters under names, in PEFT's form: what a linear layer's and a stacked weight's share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rasa_ext.methods.base import AdapterConfig, Place
from rasa_ext.nn.adapter import Adapter


@dataclass(frozen=True)
class RowAdapters:
    """The adapter of each row of a batch, whose rows beam search repeats ``beams`` times."""

    names: tuple[str, ...]
    beams: int = 1

    def of(self, rows: int) -> list[str]:
        """Give the adapter of each of ``rows`` rows; an encoder's are not repeated.

        Raises ValueError where the counts do not fit.
        """
        for repeat in (1, self.beams):
            if rows == len(self.names) * repeat:
                return [name for name in self.names for _ in range(repeat)]
        raise ValueError(
            f"adapter_names: expected one name for each row of a layer's input, got "
            f"{len(self.names)} names for {rows} rows; a layer that sees tokens of several rows as "
            "one batch, as those of experts do, cannot tell them apart."
        )


class NamedAdapters(BaseTunerLayer, nn.Module):
    """The named adapters of one weight.

    The pool of an adapter is owned, as ``rasa_pool_A`` and ``rasa_pool_B``, by the first of its
    group; the others know that one, unregistered, and look the pool up in each forward. So every
    parameter stands once in a ``state_dict``, and whatever replaces a parameter (loading with
    ``assign``, moving, casting) is seen by all. Less the adapter's name, parameters are named as in
    the package's own files.

    Where the weight lies, and what caches depend on the adapters, is a subclass's affair.
    """

    adapter_layer_names = ("rasa_A", "rasa_B", "rasa_d", "rasa_pool_A", "rasa_pool_B")
    other_param_names = ("configs", "places", "pool_owners")
    rasa_pool_A: nn.ParameterDict

    def _begin(self) -> None:
        """Own no adapter yet: the part of ``__init__`` that all have."""
        self.subtracts = False  # whether unmerging subtracts, so that merging keeps no copy
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self.configs: dict[str, AdapterConfig] = {}
        self.places: dict[str, Place] = {}
        self.pool_owners: dict[str, NamedAdapters] = {}
        self.merged_adapters: list[str] = []
        self.rows: RowAdapters | None = None  # set for the time of a forward with adapter_names

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what was computed from the adapters, as their memory is another now."""
        raise NotImplementedError

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError where the sum with these adapters, or the active ones, is not finite."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        config: AdapterConfig,
        places: list[Place],
        index: int,
        owner: NamedAdapters,
        init_weights: bool = True,
    ) -> None:
        """Add an adapter; ``owner`` is the first of its group."""
        place = places[index]
        self._add(adapter_name, "rasa_", config.own(place), init_weights)
        tensors = config.pool(places) if owner is self or index == 0 else {}
        if index == 0:
            self._add(adapter_name, "rasa_pool_", tensors, init_weights)
        if adapter_name in owner.rasa_pool_A:
            self.pool_owners[adapter_name] = owner
        self.configs[adapter_name], self.places[adapter_name] = config, place

    def _add(
        self, adapter_name: str, prefix: str, tensors: dict[str, Tensor], init_weights: bool
    ) -> None:
        for name, tensor in tensors.items():
            if name == "B" and not init_weights and tensor.numel():
                with torch.no_grad():
                    for each in tensor if tensor.dim() == 3 else (tensor,):
                        nn.init.kaiming_uniform_(each, a=5**0.5)
            getattr(self, f"{prefix}{name}")[adapter_name] = tensor

    def named(self, adapter_name: str) -> Adapter:
        """Give an adapter by its name, active or not."""
        parts: dict[str, Any] = self._modules
        config = self.configs[adapter_name]
        own = {f: parameter_of(parts[f"rasa_{f}"], adapter_name) for f in config.trained}
        pool = {}
        owner = self.pool_owners.get(adapter_name)
        if owner is not None:
            pools: dict[str, Any] = owner._modules
            pool = {f: parameter_of(pools[f"rasa_pool_{f}"], adapter_name) for f in "AB"}
        return Adapter(config, own, pool, self.places[adapter_name])

    def _active(self) -> list[str]:
        """List the active adapters that the weight has."""
        return [name for name in self.active_adapters if name in self.configs]

    def live(self) -> list[str]:
        """List those that the forward adds to all rows of the base's output."""
        if self._disable_adapters or self.merged or self.rows is not None:
            return []
        return self._active()

    def _with_merged(self, adapter_names: list[str]) -> list[str]:
        """List the merged adapters and the named ones that the weight has, each once."""
        names = dict.fromkeys([*self.merged_adapters, *adapter_names])
        return [name for name in names if name in self.configs]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move as PEFT does, but keep the dtype: an adapter's is its config's, not its base's."""
        target = self.device if device is None else device
        self._change(adapter_name, lambda tensor: tensor.to(target))

    def cast_adapter(self, adapter_name: str) -> None:
        """Give an adapter's parameters the dtype of its config, whatever a file had."""
        if adapter_name in self.configs:
            dtype = self.configs[adapter_name].adapter_dtype
            self._change(adapter_name, lambda tensor: tensor.to(dtype))

    def _change(self, adapter_name: str, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.adapter_layer_names:
            parameter = getattr(self, name)._parameters.get(adapter_name)
            if parameter is not None and not parameter.is_meta:
                parameter.data = change(parameter.data)
        self.forget()

    def extra_repr(self) -> str:
        """Show effective ranks by adapter."""
        ranks = {name: self.named(name).factors().rank for name in self.configs}
        return f"effective_rank={ranks}{', merged' if self.merged else ''}"


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Do ``getattr`` without nn.Module's slow lookup, as every forward of every layer needs it."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:  # parametrized, or a replica of nn.DataParallel
        found = getattr(module, name)
    return found
