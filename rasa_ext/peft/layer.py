"""One adapted layer under PEFT: parameters under adapter names, the maths of ``AdaptedLinear``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, overload

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.linear import LinearLayer, is_linear
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.adapter import Adapter
from rasa_ext.nn.split import SplitLinear
from rasa_ext.patching.merge_quantized import (
    Dequantized,
    dense_dtype,
    dequantize_and_merge,
    restore_quantized,
)
from rasa_ext.patching.subtraction import Rest, rest
from rasa_ext.peft.named import NamedAdapters, RowAdapters


class RasaPeftLinear(NamedAdapters, AdaptedLinear):
    """A frozen linear layer with any number of named RaSA adapters."""

    def __init__(self, base_layer: LinearLayer, backend: Any = None) -> None:
        """Adapt ``base_layer``; ``backend`` is PEFT's for it, where it is quantized."""
        super().__init__(base_layer)
        self._backend = backend
        self.dense_dtype: torch.dtype | None = None  # of a dense base in a quantized one's place
        self.dequantized: Dequantized | None = None
        self._begin()
        self.train(base_layer.training)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.base_layer.weight.device

    def forget(self) -> None:
        """Forget the cached pack."""
        self.drop_pack()

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
            names = self.live()
            if not names:
                return None
            adapter_name = names[0]
        return self.named(adapter_name)

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
        for name in self.live()[1:]:
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
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                "call unmerge_adapter() of the PEFT model first."
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute an adapter's dW in its base weight's orientation.

        It is float32, or float64 over a float64 base.
        """
        dtype = ops.accumulation_dtype(self.base_layer.weight.dtype)
        Ap, Bp = ops.pack(*self.adapter(adapter).factors(), dtype, 1)
        delta: Tensor = ops.delta_group(Ap[None], Bp[None])[0]
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

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError where the sum with these adapters, or the active ones, is not finite."""
        self.merged_weight(adapter_names, safe_merge=True)

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


class SplitPeftLinear(SplitLinear, RasaPeftLinear):
    """A RasaPeftLinear over a base layer of which every process has a part."""


def pool_owners(model: nn.Module, adapter_name: str) -> list[str]:
    """Name the layers of a model that own a pool of the adapter."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, RasaPeftLinear) and module.pool_names.get(adapter_name)
    ]
