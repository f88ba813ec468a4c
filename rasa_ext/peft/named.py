"""Named adapters in PEFT's form: the shared part of linear layers and stacked weights."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from rasa_ext.methods.base import AdapterConfig
from rasa_ext.nn.adapter import Adapter, LayerSpec
from rasa_ext.nn.packs import Decoding, PackSet
from rasa_ext.patching.fold import Merging, check_parts, merge_parts, unmerge_parts
from rasa_ext.patching.parts import Part


@dataclass
class RowAdapters:
    """One adapter per row of a batch; beam search repeats each row ``beams`` times."""

    names: tuple[str, ...]
    beams: int = 1
    grad: bool = False
    """Whether the model's forward is run with grad, which ``generate`` never does."""

    def of(self, rows: int) -> list[str]:
        """Return the adapter of each of ``rows`` rows; an encoder's rows are not repeated.

        Raises ValueError if the counts do not fit.
        """
        for repeat in (1, self.beams):
            if rows == len(self.names) * repeat:
                return [name for name in self.names for _ in range(repeat)]
        raise ValueError(
            f"adapter_names: expected one name for each row of a layer's input, got "
            f"{len(self.names)} names for {rows} rows; a layer that sees tokens of several rows as "
            "one batch, such as a layer of an expert, cannot tell the rows apart."
        )


class NamedAdapters(BaseTunerLayer, nn.Module):
    """The named adapters of one weight.

    A tensor that the method names A is ``rasa_A[adapter_name]``. A pool's is a child, such as
    ``rasa_pool_0_A``, of the nearest module that runs all layers of the group. The first layer of
    the group has unregistered references, by which PEFT trains, moves and deletes the pool. Every
    layer looks the pool up in each forward. So a ``state_dict`` has every tensor once, and all
    layers see a replaced tensor (loading with ``assign``, moving, casting).

    Subclasses decide where the weight is and what caches depend on the adapters.
    """

    other_param_names = ("configs", "specs", "own_names", "pools", "packs")

    def _reset(self) -> None:
        """Start without adapters: the part of ``__init__`` that all subclasses share."""
        self.merging = Merging()
        self.adapter_layer_names = ()  # set by the methods of the adapters
        self.configs: dict[str, AdapterConfig] = {}
        self.specs: dict[str, LayerSpec] = {}
        self.own_names: dict[str, tuple[str, ...]] = {}
        self.pools: dict[str, dict[str, Tensors]] = {}
        self.packs: dict[str, PackSet] = {}
        self.merged_adapters: list[str] = []
        self.rows: RowAdapters | None = None  # set during a forward with adapter_names

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    def forget(self) -> None:
        """Clear what was computed from the adapters, whose memory has changed."""
        raise NotImplementedError

    def parts(self, adapter_names: Sequence[str]) -> list[Part]:
        """Return the parts of the weight, one or more, with the changes of these adapters."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        config: AdapterConfig,
        specs: list[LayerSpec],
        index: int,
        first: NamedAdapters,
        decoding: Decoding,
        home: tuple[nn.Module, str, str] | None,
        init_weights: bool = True,
    ) -> None:
        """Add an adapter; ``first`` is the first layer of the group.

        ``home`` is the module that takes the group's pool, the module's name, and how the names of
        the pool's tensors begin there. None leaves the pool to the first layer.
        """
        spec = specs[index]
        own = config.layer_tensors(spec)
        self._add(adapter_name, own, init_weights, (self, "", "rasa_"))
        if index == 0:
            pool, home = config.group_tensors(specs), home or (self, "", "rasa_pool_")
            self.pools[adapter_name] = self._add(adapter_name, pool, init_weights, home)
            self.packs[adapter_name] = PackSet(decoding, methodcaller("named", adapter_name))
        self.own_names[adapter_name] = tuple(own)
        self.configs[adapter_name], self.specs[adapter_name] = config, spec
        self.pools[adapter_name] = first.pools[adapter_name]
        self.packs[adapter_name] = first.packs[adapter_name]
        self.packs[adapter_name].join(spec.index, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and join the copied groups."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # nn.Module's is untyped
        for name, packs in self.packs.items():
            packs.join(self.specs[name].index, self)

    @torch.no_grad()
    def _add(
        self,
        adapter_name: str,
        tensors: dict[str, Tensor],
        init_weights: bool,
        place: tuple[nn.Module, str, str],
    ) -> dict[str, Tensors]:
        """Register an adapter's tensors, and return the modules that have them."""
        parent, where, prefix = place
        parts: dict[str, Tensors] = {}
        for field, tensor in tensors.items():
            trained = isinstance(tensor, nn.Parameter) and not tensor.is_meta
            if trained and not init_weights and tensor.numel() and not tensor.any():
                tensor.uniform_(-(tensor.shape[-1] ** -0.5), tensor.shape[-1] ** -0.5)
            if (name := f"{prefix}{field}") not in parent._modules:
                parent.add_module(name, Tensors())
            parts[field] = cast(Tensors, parent._modules[name])
            parts[field][adapter_name] = tensor
            if (known := f"{where}{name}") not in self.adapter_layer_names:
                self.adapter_layer_names += (known,)
                if parent is not self:
                    self.__dict__[known] = parts[field]  # a reference, not a submodule
        return parts

    def _get_available_adapters(self) -> set[str]:
        """Return the adapter names for PEFT, also of adapters without tensors in this layer."""
        return set(self.configs)

    def named(self, adapter_name: str) -> Adapter:
        """Return an adapter by name, active or not."""
        parts: dict[str, Any] = self._modules
        names = self.own_names[adapter_name]
        own = {f: tensor_of(parts[f"rasa_{f}"], adapter_name) for f in names}
        pool = {f: tensor_of(part, adapter_name) for f, part in self.pools[adapter_name].items()}
        config, spec = self.configs[adapter_name], self.specs[adapter_name]
        return Adapter(config, own, pool, spec, self, self.packs[adapter_name])

    def adapters(self) -> Iterator[Adapter]:
        """Return every adapter of the weight, active or not."""
        return (self.named(name) for name in self.configs)

    def live_names(self) -> list[str]:
        """List the adapters that the forward adds to all rows of the base's output."""
        if self._disable_adapters or self.merged or self.rows is not None:
            return []
        return [name for name in self.active_adapters if name in self.configs]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight, in addition to those already merged.

        W + dW of all of them is one sum, rounded once. ``merging`` sets what is stored for
        ``unmerge``. A quantized base becomes dense. An error changes nothing. With ``safe_merge``
        or over a quantized base, raises ValueError if the sum is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.configs]
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        before = self.merged_adapters
        self._unmerge()
        try:
            self._merge([*before, *names])
        except BaseException:
            self._merge(before)
            raise

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError if the sum with these adapters, or the active ones, is not finite."""
        before = self.merged_adapters
        names = dict.fromkeys([*before, *(adapter_names or self.active_adapters)])
        chosen = [name for name in names if name in self.configs]
        if not chosen:
            return
        self._unmerge()
        try:
            # PEFT's words, which callers match.
            said = f"NaNs detected in the merged weights. The adapter {' and '.join(chosen)} seems"
            where = f"safe_merge: {said} to be broken"
            check_parts(self.parts(chosen), self.merging.dtype, where)
        finally:
            self._merge(before)

    def _merge(self, names: list[str]) -> None:
        """Merge these adapters into the base weight, which is not merged."""
        if names:
            merge_parts(self.parts(names), self.merging)
            self.merged_adapters = names

    def unmerge(self) -> None:
        """Restore the exact values that the base weight had before the first ``merge``."""
        if self.merged:
            self._unmerge()
        else:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def _unmerge(self) -> None:
        if self.merged:
            unmerge_parts(self.parts(self.merged_adapters))
            self.merged_adapters = []

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move as PEFT does, but leave the dtype, which the adapter's config sets."""
        target = self.device if device is None else device
        self._change(adapter_name, lambda t: t if t.is_meta else t.to(target))

    def cast_adapter(self, adapter_name: str, autocast: bool) -> None:
        """Cast an adapter's tensors to the config's dtype, whatever a file had; not integers.

        Without ``autocast``, the dtype is the base weight's from now on, unless that is packed.
        """
        if adapter_name in self.configs:
            config, base = self.configs[adapter_name], self.weight.dtype
            if not autocast and base.is_floating_point and base.itemsize > 1:
                config = dataclasses.replace(config, adapter_dtype=base)
                self.configs[adapter_name] = config
            dtype = config.adapter_dtype
            self._change(adapter_name, lambda t: t.to(dtype) if t.is_floating_point() else t)

    def _change(self, adapter_name: str, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.adapter_layer_names:
            tensor = getattr(self, name).get(adapter_name)
            if tensor is not None:
                tensor.data = change(tensor.data)
        self.forget()

    def extra_repr(self) -> str:
        """Show effective ranks by adapter."""
        ranks = {name: self.named(name).factors().rank for name in self.configs}
        return f"effective_rank={ranks}{', merged' if self.merged else ''}"


class Tensors(nn.ParameterDict):
    """A tensor per adapter: Parameters, and buffers, which PEFT must not train.

    PEFT sets ``requires_grad`` of what ``items`` and ``values`` return.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Register a Parameter as a parameter, and any other tensor as a buffer."""
        if isinstance(value, nn.Parameter):
            super().__setitem__(key, value)
        else:
            self._keys[key] = None
            self.register_buffer(key, value)

    def items(self) -> Iterable[tuple[str, Any]]:
        """Return the Parameters by adapter."""
        return self._parameters.items()

    def values(self) -> Iterable[Any]:
        """Return the Parameters."""
        return self._parameters.values()


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Do ``getattr`` without nn.Module's slow lookup, as every forward of every layer calls it."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:  # a buffer, parametrized, or a replica of nn.DataParallel
        found = getattr(module, name)
    return found
