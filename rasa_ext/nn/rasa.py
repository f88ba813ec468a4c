"""RasaLinear and RasaPool: the modules of a patched model that own an adapter's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.linear import linear_shape
from rasa_ext.nn.adapted_linear import AdaptedLinear, Adapter, Method


class RasaPool(nn.Module):
    """What one group owns together: under RaSA A (L*k, in) and B (out, L*k), for its L layers."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Own ``tensors`` under their names: Parameters are trained, others are buffers."""
        super().__init__()
        _register(self, tensors)

    def extra_repr(self) -> str:
        """Shapes by name."""
        return ", ".join(f"{name}={tuple(t.shape)}" for name, t in _tensors_of(self).items())


class RasaLinear(AdaptedLinear):
    """A frozen linear layer with an adapter: ``base(x) + x dW^T``.

    Its own tensors are attributes, under RaSA ``A`` (r-k, in), ``B`` (out, r-k) and ``d``
    (r-k+L*k,); ``pool`` is its group's, or None where the method has none (k = 0). The pool is a
    registered submodule of the group's first layer only, so that no parameter stands twice in a
    ``state_dict``; the other layers hold a plain reference, which follows through
    ``copy.deepcopy`` and ``torch.save``.
    """

    def __init__(self, base_layer: nn.Module, config: Method, place: Any, pool: RasaPool | None):
        """Adapt ``base_layer``.

        Args:
            base_layer: any linear layer, quantized ones included.
            config: of the method, which says what the layer owns.
            place: in the group; the layer of index 0 registers ``pool``.
            pool: the group's.
        """
        super().__init__(base_layer)
        self.config, self.place = config, place
        own = config.own(place)
        self._names = tuple(own)
        _register(self, own)
        if place.index == 0:
            self.pool = pool
        else:
            self.__dict__["pool"] = pool
        self.train(base_layer.training)

    def adapter(self) -> Adapter:
        """The layer's adapter."""
        pool = self._modules.get("pool") or self.__dict__.get("pool")
        own = _tensors_of(self)
        if len(own) != len(self._names):  # parametrized, or a replica of nn.DataParallel
            own = {name: getattr(self, name) for name in self._names}
        return Adapter(self.config, own, {} if pool is None else _tensors_of(pool), self.place)

    def adapters(self) -> Iterator[Adapter]:
        """That one."""
        yield self.adapter()

    def own_tensors(self) -> dict[str, Tensor]:
        """The layer's own tensors by name, the pool left out."""
        return {name: getattr(self, name) for name in self._names}

    def pool_tensors(self) -> dict[str, Tensor]:
        """Those of its pool by name."""
        return {} if self.pool is None else dict(_tensors_of(self.pool))

    @property
    def effective_rank(self) -> int:
        """R: the rank of the layer's change of its weight; r - k + L*k under RaSA."""
        return self.adapter().factors().rank

    @property
    def weight(self) -> Tensor:
        """The base's weight, as model code that looks at its dtype or device expects it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the base's weight at present."""
        return self.merged_base is not None

    def extra_repr(self) -> str:
        """Widths and ranks."""
        out_features, in_features = linear_shape(self.base_layer)
        state = ", merged" if self.merged else ""
        return (
            f"in_features={in_features}, out_features={out_features}, "
            f"effective_rank={self.effective_rank}{state}"
        )


def _register(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


def _tensors_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters and buffers, by nn.Module's own dictionaries.

    ``getattr`` is slow, and every forward of every layer asks.
    """
    if module._buffers:
        return {**module._parameters, **module._buffers}
    return module._parameters
