"""Adapted linear layer under PEFT: parameters by adapter name, computation by ``AdaptedLinear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.linear import LinearLayer
from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.adapter import Adapter
from rasa_ext.nn.split import SplitLinear
from rasa_ext.patching.parts import Part, deltas_of, linear_part
from rasa_ext.patching.state import inner_name
from rasa_ext.peft.named import NamedAdapters, RowAdapters


class RasaPeftLinear(NamedAdapters, AdaptedLinear):
    """A frozen linear layer with any number of named RaSA adapters."""

    unmerging = "unmerge_adapter() of the PEFT model"

    def __init__(self, base_layer: LinearLayer, backend: Any = None) -> None:
        """Wrap ``base_layer``; ``backend`` is PEFT's for a quantized one."""
        super().__init__(base_layer)
        self._backend = backend
        self._reset()
        self.train(base_layer.training)

    def forget(self) -> None:
        """Clear the cached pack."""
        self.drop_pack()

    @property
    def quantization_backend(self) -> Any:  # type: ignore[override]  # it follows the base
        """PEFT's backend for a quantized base; None over a dense one, also while merged."""
        return None if isinstance(self.merged_base, nn.Module) else self._backend

    weight = AdaptedLinear.weight  # and not PEFT's

    def live_adapters(self) -> list[Adapter]:
        """Return the adapters that a forward adds to all rows."""
        return [self.named(name) for name in self.live_names()]

    def adapter(self) -> Adapter | None:
        """Return the first adapter that the forward adds to all rows, or None."""
        names = self.live_names()
        return self.named(names[0]) if names else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute y (..., out) from x (..., in): the base and every active adapter."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self.rows is not None and not self._disable_adapters:
            return self._row_by_row(x, self.rows, *args, **kwargs)
        y = super().forward(x, *args, **kwargs)
        for name in self.live_names()[1:]:
            y = self._added(y, x, self.named(name))
        return y

    def _row_by_row(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base, and add to each output row the change of the row's adapter."""
        if rows.grad and not torch.is_grad_enabled():
            raise ValueError(
                "adapter_names: expected a forward without gradient checkpoints, whose "
                "recomputation does not know the rows; run it in torch.no_grad(), or one adapter "
                "at a time with model.set_adapter(name)."
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        names = rows.of(len(x))
        for name in dict.fromkeys(names):
            if name in self.configs:
                chosen = [row for row, its in enumerate(names) if its == name]
                index = torch.tensor(chosen, device=x.device)
                y = y.index_copy(0, index, self._added(y[index], x[index], self.named(name)))
        return y

    def parts(self, adapter_names: Sequence[str]) -> list[Part]:
        """Return the weight as a part, with the changes of these adapters."""
        adapters = [self.named(name) for name in adapter_names]
        return [linear_part(adapters[0].spec.name, self, adapters)]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute an adapter's dW in the layout of the base weight.

        It is in float32, or float64 over a float64 base.
        """
        delta = deltas_of(self.parts([adapter]))[0]
        return delta.t() if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: PEFT can convert the layer to LoRA, since RaSA adds dW to the base."""
        return True


class SplitPeftLinear(SplitLinear, RasaPeftLinear):
    """A RasaPeftLinear over a base layer that is split over processes."""

    def update_layer(self, adapter_name: str, *args: Any) -> None:
        """Add an adapter that every process has."""
        super().update_layer(adapter_name, *args)
        self.share(self.named(adapter_name))


def keys_in_files(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the names that an adapter's linear tensors have in this package's files."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, RasaPeftLinear) and adapter_name in module.configs:
            prefix = f"{PREFIX}{name.removeprefix(PREFIX)}.rasa_"
            found += [f"{prefix}{field}" for field in module.own_names[adapter_name]]
            if module.specs[adapter_name].index == 0:
                found += [f"{prefix}pool_{field}" for field in module.pools[adapter_name]]
    return found


def pools_in_files(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the names of an adapter's pools in ``state_dict``, by key as if on the first layer."""
    modules = {module: inner_name(name) for name, module in model.named_modules()}
    return {
        f"{name}.rasa_pool_{field}.{adapter_name}": f"{modules[part]}.{adapter_name}"
        for layer, name in modules.items()
        if isinstance(layer, NamedAdapters) and adapter_name in layer.configs
        if layer.specs[adapter_name].index == 0
        for field, part in layer.pools[adapter_name].items()
        if part in modules
    }
