"""One adapted layer under PEFT: parameters under adapter names, the maths of ``AdaptedLinear``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from rasa_ext import ops
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
from rasa_ext.peft.mixed import Rows


class RasaPeftLinear(BaseTunerLayer, AdaptedLinear):
    """A frozen linear layer with any number of named RaSA adapters.

    The pool of an adapter is owned, as ``rasa_pool_A`` and ``rasa_pool_B``, by the first layer of
    its group; the others know that layer, unregistered, and look the pool up in each forward. So
    every number stands once in a ``state_dict``, and whatever replaces a parameter (loading with
    ``assign``, moving, casting) is seen by all layers. Less the adapter's name, parameters are
    named as in the package's own files.
    """

    adapter_layer_names = ("rasa_A", "rasa_B", "rasa_d", "rasa_pool_A", "rasa_pool_B")
    other_param_names = ("configs", "places", "pool_owners")

    def __init__(self, base_layer: nn.Module, backend: Any = None) -> None:
        """Over ``base_layer``; ``backend`` is PEFT's for it, where it is quantized."""
        super().__init__(base_layer)
        self._backend = backend
        self.dense_dtype: torch.dtype | None = None  # of a dense base in a quantized one's place
        self.densified: Dequantized | None = None
        self.subtracts = False  # whether unmerging subtracts, so that merging keeps no copy
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self.configs: dict[str, AdapterConfig] = {}
        self.places: dict[str, Place] = {}
        self.pool_owners: dict[str, RasaPeftLinear] = {}
        self.merged_adapters: list[str] = []
        self.rows: Rows | None = None  # set for the time of a forward with adapter_names
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
        if config.k:
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
    def quantization_backend(self) -> Any:
        """PEFT's way to a quantized base's weight; None over a dense base, as while merged."""
        return None if isinstance(self.merged_base, nn.Module) else self._backend

    def adapter(self, adapter_name: str | None = None) -> Adapter | None:
        """An adapter by its name, or the first that the forward adds to all rows, if any."""
        if adapter_name is None:
            names = self._live()
            if not names:
                return None
            adapter_name = names[0]
        parts = self._modules
        own = {field: parameter_of(parts[f"rasa_{field}"], adapter_name) for field in "ABd"}
        pool = {}
        owner = self.pool_owners.get(adapter_name)
        if owner is not None:
            pools = owner._modules
            pool = {f: parameter_of(pools[f"rasa_pool_{f}"], adapter_name) for f in "AB"}
        return Adapter(self.configs[adapter_name], own, pool, self.places[adapter_name])

    def adapters(self) -> Iterator[Adapter]:
        """Every adapter of the layer, active or not."""
        return (self.adapter(name) for name in self.configs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) to (..., out): the base's output and that of every active adapter."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self.rows is not None and not self._disable_adapters:
            return self._row_by_row(x, self.rows, *args, **kwargs)
        y = super().forward(x, *args, **kwargs)
        for name in self._live()[1:]:
            y = self._added(y, x, self.adapter(name))
        return y

    def _row_by_row(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, and to each of its rows that of the row's own adapter."""
        y = self.base_layer(x, *args, **kwargs)
        names = rows.of(len(x))
        for name in dict.fromkeys(names):
            if name in self.configs:
                chosen = [row for row, its in enumerate(names) if its == name]
                index = torch.tensor(chosen, device=x.device)
                y = y.index_copy(0, index, self._added(y[index], x[index], self.adapter(name)))
        return y

    def _base_alone(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        return self.base_layer(x, *args, **kwargs)

    def _active(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.configs]

    def _live(self) -> list[str]:
        """Those that the forward adds to all rows of the base's output."""
        if self._disable_adapters or self.merged or self.rows is not None:
            return []
        return self._active()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of an adapter in its base weight's orientation: float32, or float64 over float64."""
        dtype = ops.accumulation_dtype(self.get_base_layer().weight.dtype)
        Ap, Bp = ops.pack(*self.adapter(adapter).factors(), dtype, 1)
        delta = Bp.t() @ Ap
        return delta.t() if self.transposed else delta

    @torch.no_grad()
    def merged_weight(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> Tensor:
        """The base weight with its merged adapters and the named ones: one sum, rounded once.

        A quantized one is dense then, in ``dense_dtype``. Raises ValueError, with ``safe_merge``,
        where it is not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        form = format_of(self._unmerged())
        base = self._unmerged_weight() if form is None else form.dequantized(self._unmerged())
        dtype = base.dtype if form is None else dense_dtype(self._unmerged(), self.dense_dtype)
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

    def _unmerged(self) -> nn.Module:
        """The base layer, or the quantized one whose place a dense one took."""
        kept = self.merged_base
        return kept if isinstance(kept, nn.Module) else self.get_base_layer()

    def _unmerged_weight(self) -> Tensor:
        weight, kept = self.get_base_layer().weight, self.merged_base
        if isinstance(kept, Rest):
            return kept.original(weight, self._delta(self.merged_adapters))
        return weight if kept is None else kept

    def _delta(self, names: list[str]) -> Tensor:
        """The sum of several adapters' dW."""
        return sum(self.get_delta_weight(name) for name in names)

    def _with_merged(self, adapter_names: list[str]) -> list[str]:
        """The merged adapters and the named ones that this layer has, each once."""
        names = dict.fromkeys([*self.merged_adapters, *adapter_names])
        return [name for name in names if name in self.configs]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight, and keep what ``unmerge`` needs: a copy, or less.

        A quantized base becomes dense; ``densified`` tells what that cost. Raises as
        ``merged_weight`` does.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.configs]
        if not names:
            return
        if format_of(self._unmerged()) is not None:
            self._merge_quantized(names)
        else:
            merged, weight = self.merged_weight(names, safe_merge), self.get_base_layer().weight
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
        self.densified = dequantize_and_merge(self, type(self).__name__, delta, dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight back the exact values it had before the first ``merge``.

        RuntimeError where unmerging subtracts, and an adapter has changed since.
        """
        if self.merged_base is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if isinstance(self.merged_base, nn.Module):
            restore_quantized(self)
        else:
            self.get_base_layer().weight.copy_(self._unmerged_weight())
            self.merged_base = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """RaSA adds dW to its base, so PEFT can turn it into a LoRA."""
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As PEFT's, but the dtype stays: that of an adapter is its config's, not its base's."""
        device = self.get_base_layer().weight.device if device is None else device
        self._change(adapter_name, lambda tensor: tensor.to(device))

    def cast_adapter(self, adapter_name: str) -> None:
        """Give an adapter's numbers the dtype of its config, whatever a file had."""
        if adapter_name in self.configs:
            dtype = self.configs[adapter_name].adapter_dtype
            self._change(adapter_name, lambda tensor: tensor.to(dtype))

    def _change(self, adapter_name: str, change: Any) -> None:
        for name in self.adapter_layer_names:
            parameter = getattr(self, name)._parameters.get(adapter_name)
            if parameter is not None and not parameter.is_meta:
                parameter.data = change(parameter.data)
        self.drop_pack()

    def extra_repr(self) -> str:
        """Effective ranks by adapter."""
        ranks = {name: d.shape[0] for name, d in self.rasa_d.items()}
        return f"effective_rank={ranks}{', merged' if self.merged else ''}"


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """``getattr`` without nn.Module's slow lookup, since every forward of every layer does it."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found
