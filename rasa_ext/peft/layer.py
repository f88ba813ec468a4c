"""One adapted layer under PEFT: parameters under adapter names, the maths of ``AdaptedLinear``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.linear import LinearLayer, is_linear
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.methods.base import AdapterConfig, Place
from rasa_ext.nn.adapted_linear import AdaptedLinear, Adapter
from rasa_ext.patching.merge_quantized import (
    Dequantized,
    dense_dtype,
    dequantize_and_merge,
    restore_quantized,
)
from rasa_ext.patching.subtraction import Rest, rest


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


class RasaPeftLinear(BaseTunerLayer, AdaptedLinear):
    """A frozen linear layer with any number of named RaSA adapters.

    The pool of an adapter is owned, as ``rasa_pool_A`` and ``rasa_pool_B``, by the first layer of
    its group; the others know that layer, unregistered, and look the pool up in each forward. So
    every parameter stands once in a ``state_dict``, and whatever replaces a parameter (loading with
    ``assign``, moving, casting) is seen by all layers. Less the adapter's name, parameters are
    named as in the package's own files.
    """

    adapter_layer_names = ("rasa_A", "rasa_B", "rasa_d", "rasa_pool_A", "rasa_pool_B")
    other_param_names = ("configs", "places", "pool_owners")
    rasa_pool_A: nn.ParameterDict

    def __init__(self, base_layer: LinearLayer, backend: Any = None) -> None:
        """Adapt ``base_layer``; ``backend`` is PEFT's for it, where it is quantized."""
        super().__init__(base_layer)
        self._backend = backend
        self.dense_dtype: torch.dtype | None = None  # of a dense base in a quantized one's place
        self.dequantized: Dequantized | None = None
        self.subtracts = False  # whether unmerging subtracts, so that merging keeps no copy
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self.configs: dict[str, AdapterConfig] = {}
        self.places: dict[str, Place] = {}
        self.pool_owners: dict[str, RasaPeftLinear] = {}
        self.merged_adapters: list[str] = []
        self.rows: RowAdapters | None = None  # set for the time of a forward with adapter_names
        self.train(base_layer.training)

    def update_layer(
        self,
        adapter_name: str,
        config: AdapterConfig,
        places: list[Place],
        index: int,
        owner: RasaPeftLinear,
        init_weights: bool = True,
    ) -> None:
        """Add an adapter to this layer; ``owner`` is the first of its group."""
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
                nn.init.kaiming_uniform_(tensor, a=5**0.5)
            getattr(self, f"{prefix}{name}")[adapter_name] = tensor

    @property
    def quantization_backend(self) -> Any:  # type: ignore[override]  # it follows the base
        """PEFT's way to a quantized base's weight; None over a dense base, as while merged."""
        return None if isinstance(self.merged_base, nn.Module) else self._backend

    @overload
    def adapter(self) -> Adapter | None: ...

    @overload
    def adapter(self, adapter_name: str) -> Adapter: ...

    def adapter(self, adapter_name: str | None = None) -> Adapter | None:
        """Give an adapter by its name, or the first that the forward adds to all rows, if any."""
        if adapter_name is None:
            names = self._live()
            if not names:
                return None
            adapter_name = names[0]
        parts: dict[str, Any] = self._modules
        config = self.configs[adapter_name]
        own = {f: parameter_of(parts[f"rasa_{f}"], adapter_name) for f in config.trained}
        pool = {}
        owner = self.pool_owners.get(adapter_name)
        if owner is not None:
            pools: dict[str, Any] = owner._modules
            pool = {f: parameter_of(pools[f"rasa_pool_{f}"], adapter_name) for f in "AB"}
        return Adapter(config, own, pool, self.places[adapter_name])

    def adapters(self) -> Iterator[Adapter]:
        """Give every adapter of the layer, active or not."""
        return (self.adapter(name) for name in self.configs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute y (..., out) from x (..., in): the base and every active adapter."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self.rows is not None and not self._disable_adapters:
            return self._row_by_row(x, self.rows, *args, **kwargs)
        y = super().forward(x, *args, **kwargs)
        for name in self._live()[1:]:
            y = self._added(y, x, self.adapter(name))
        return y

    def _row_by_row(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base, and add to each of its output's rows that of the row's own adapter."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        names = rows.of(len(x))
        for name in dict.fromkeys(names):
            if name in self.configs:
                chosen = [row for row, its in enumerate(names) if its == name]
                index = torch.tensor(chosen, device=x.device)
                y = y.index_copy(0, index, self._added(y[index], x[index], self.adapter(name)))
        return y

    def _base_alone(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _active(self) -> list[str]:
        """List the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.configs]

    def _live(self) -> list[str]:
        """List those that the forward adds to all rows of the base's output."""
        if self._disable_adapters or self.merged or self.rows is not None:
            return []
        return self._active()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute an adapter's dW in its base weight's orientation.

        It is float32, or float64 over a float64 base.
        """
        dtype = ops.accumulation_dtype(self.base_layer.weight.dtype)
        Ap, Bp = ops.pack(*self.adapter(adapter).factors(), dtype, 1)
        delta = Bp.t() @ Ap
        return delta.t() if self.transposed else delta

    @torch.no_grad()
    def merged_weight(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> Tensor:
        """Add merged adapters and the named ones to the base weight: one sum, rounded once.

        A quantized one is dense then, in ``dense_dtype``. Raises ValueError, with ``safe_merge``,
        where it is not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        fmt = format_of(self._unmerged())
        base = self._unmerged_weight() if fmt is None else fmt.dequantize(self._unmerged())
        dtype = base.dtype if fmt is None else dense_dtype(self._unmerged(), self.dense_dtype)
        merged = base.to(ops.accumulation_dtype(base.dtype), copy=True)
        for name in self._with_merged(names):
            merged += self.get_delta_weight(name)
        merged = merged.to(dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"safe_merge: expected finite merged weights, but with {', '.join(names)} some are "
                f"not finite in {dtype}; nothing was merged."
            )
        return merged

    def _unmerged(self) -> LinearLayer:
        """Give the base layer, or the quantized one whose place a dense one took."""
        kept = self.merged_base
        return kept if isinstance(kept, nn.Module) and is_linear(kept) else self.base_layer

    def _unmerged_weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        kept: Tensor | Rest | None = self.merged_base
        if isinstance(kept, Rest):
            return kept.original(weight, self._delta(self.merged_adapters))
        return weight if kept is None else kept

    def _delta(self, names: list[str]) -> Tensor:
        """Sum the dW of one adapter or more."""
        first, *others = names
        return sum((self.get_delta_weight(name) for name in others), self.get_delta_weight(first))

    def _with_merged(self, adapter_names: list[str]) -> list[str]:
        """List the merged adapters and the named ones that this layer has, each once."""
        names = dict.fromkeys([*self.merged_adapters, *adapter_names])
        return [name for name in names if name in self.configs]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight, and keep what ``unmerge`` needs: a copy, or less.

        A quantized base becomes dense; ``dequantized`` tells what that cost. Raises as
        ``merged_weight`` does.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.configs]
        if not names:
            return
        if format_of(self._unmerged()) is not None:
            self._merge_quantized(names)
        else:
            merged, weight = self.merged_weight(names, safe_merge), self.base_layer.weight
            if self.subtracts or isinstance(self.merged_base, Rest):
                delta = self._delta(self._with_merged(names))
                self.merged_base = rest(self._unmerged_weight(), merged, delta)
            elif self.merged_base is None:
                self.merged_base = weight.detach().clone()
            weight.copy_(merged)
        self.merged_adapters = [*self.merged_adapters, *names]

    def _merge_quantized(self, names: list[str]) -> None:
        delta = self._delta(self._with_merged(names))
        dtype = dense_dtype(self._unmerged(), self.dense_dtype)
        self.dequantized = dequantize_and_merge(self, type(self).__name__, delta, dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight back the exact values it had before the first ``merge``.

        Raises RuntimeError where unmerging subtracts, and an adapter has changed since.
        """
        if self.merged_base is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if isinstance(self.merged_base, nn.Module):
            restore_quantized(self)
        else:
            self.base_layer.weight.copy_(self._unmerged_weight())
            self.merged_base = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that it can turn this into a LoRA, since RaSA adds dW to its base."""
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move as PEFT does, but keep the dtype: an adapter's is its config's, not its base's."""
        target = self.base_layer.weight.device if device is None else device
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
        self.drop_pack()

    def extra_repr(self) -> str:
        """Show effective ranks by adapter."""
        ranks = {name: self.adapter(name).factors().rank for name in self.configs}
        return f"effective_rank={ranks}{', merged' if self.merged else ''}"


def pool_owners(model: nn.Module, adapter_name: str) -> list[str]:
    """Name the layers of a model that own a pool of the adapter."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, RasaPeftLinear) and adapter_name in module.rasa_pool_A
    ]


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Do ``getattr`` without nn.Module's slow lookup, as every forward of every layer needs it."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:  # parametrized, or a replica of nn.DataParallel
        found = getattr(module, name)
    return found
