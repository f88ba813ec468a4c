"""RasaLinear and RasaPool: the modules that own an adapter's tensors in a patched model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.linear import LinearLayer, linear_shape
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.adapter import Adapter, LayerSpec, Method
from rasa_ext.nn.packs import PackSet
from rasa_ext.nn.split import SplitLinear


class TensorOwner(nn.Module):
    """A module with an adapter's tensors as attributes: Parameters are trained, others buffers."""

    _names: tuple[str, ...] = ()

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors by these."""
        for name in self._names:
            delattr(self, name)
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Any]:
        """Look up the tensors by name in nn.Module's dictionaries.

        ``getattr`` is slow, and every forward of every layer calls this.
        """
        tensors: dict[str, Any] = self._parameters
        if self._buffers:
            tensors = {**tensors, **self._buffers}
        if len(tensors) != len(self._names):  # parametrized, or a replica of nn.DataParallel
            tensors = {name: getattr(self, name) for name in self._names}
        return tensors


class RasaPool(TensorOwner):
    """The shared rank pool of one group of L layers: under RaSA A (L*k, in) and B (out, L*k).

    They are A_S and B_S of arXiv 2503.12576, section 3. ``patch_model`` makes one pool for each
    group, as the last child of the nearest module that runs all layers of the group. So the pool
    belongs to whatever walks, copies, saves or shards that module. Layers refer to the pool.

    Args:
        tensors: the tensors by name; Parameters are trained, others become buffers.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> layers = [m for m in model.modules() if isinstance(m, rasa_ext.RasaLinear)]
        >>> layers[0].pool is model.model.rasa_pool_0
        True
        >>> group = [layer for layer in layers if layer.pool is layers[0].pool]
        >>> layers[0].pool.A.shape == (len(group), layers[0].in_features)
        True
    """

    A: Tensor
    B: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.replace(tensors)

    def extra_repr(self) -> str:
        """Return the shapes by name, for ``repr``."""
        return ", ".join(f"{name}={tuple(t.shape)}" for name, t in self.tensors().items())


class ContainerPool(RasaPool):
    """A pool whose tensors are parameters of a container such as ``nn.Sequential``.

    A pool cannot be a child of a container, which calls or lists its children. In any other module
    it is the last child: the module's own parameters would come first, and code that takes a dtype
    from ``next(module.parameters())`` would see the adapter's.
    """

    _of: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    """The container's parameters and buffers; a reference to the container would be a cycle."""
    _prefix = ""

    def register(self, model: nn.Module, prefix: str) -> None:
        """Move the tensors to a container, where their names begin with ``prefix``."""
        tensors = dict(super().tensors())
        super().replace({})
        self._of, self._prefix = (model._parameters, model._buffers), prefix
        self.replace(tensors)

    def release(self) -> None:
        """Take the tensors off the container."""
        tensors = self.tensors()
        self.replace({})
        self._of, self._prefix = ({}, {}), ""
        super().replace(tensors)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors by these."""
        if not self._prefix:
            super().replace(tensors)
            return
        for name in self._names:
            for registered in self._of:
                registered.pop(f"{self._prefix}{name}", None)
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self._of[not isinstance(tensor, nn.Parameter)][f"{self._prefix}{name}"] = tensor

    def tensors(self) -> dict[str, Any]:
        """Look the tensors up in the container's."""
        if not self._prefix:
            return super().tensors()
        parameters, buffers = self._of
        names = ((name, f"{self._prefix}{name}") for name in self._names)
        return {n: parameters[key] if key in parameters else buffers[key] for n, key in names}

    def __getattr__(self, name: str) -> Any:
        """Return a tensor by name."""
        if name in self.__dict__.get("_names", ()) and self._prefix:
            return self.tensors()[name]
        return super().__getattr__(name)


class AdapterOwner(TensorOwner):
    """A module that owns an adapter's tensors as attributes and refers to the group's pool."""

    A: Tensor
    B: Tensor
    d: Tensor
    pool: RasaPool | None

    def own(self, config: Method, spec: LayerSpec, pool: RasaPool | None, packs: PackSet) -> None:
        """Register the tensors that ``config`` makes for a layer, and the group's ``pool``."""
        self.config, self.spec, self.packs = config, spec, packs
        packs.join(spec.index, self)
        self.replace(config.layer_tensors(spec))
        self.__dict__["pool"] = pool  # no submodule

    def adapter(self) -> Adapter:
        """Return the layer's adapter."""
        shared = {} if self.pool is None else self.pool.tensors()
        return Adapter(self.config, self.tensors(), shared, self.spec, self, self.packs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and join the copied group."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # nn.Module's is untyped
        self.packs.join(self.spec.index, self)

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the private tensors by name, without the pool."""
        return {name: getattr(self, name) for name in self._names}

    def pool_tensors(self) -> dict[str, Tensor]:
        """Return the pool's tensors by name."""
        return {} if self.pool is None else dict(self.pool.tensors())

    @property
    def effective_rank(self) -> int:
        """The rank R of the weight's change: r - k + L*k under RaSA."""
        return self.adapter().factors().rank


class RasaLinear(AdapterOwner, AdaptedLinear):
    """A frozen linear layer with an adapter: ``base(x) + x dW^T``, x (..., in) to (..., out).

    Under RaSA dW = [B | B_pool] diag(d) [A ; A_pool] (arXiv 2503.12576, section 3). The layer's
    private tensors are attributes: ``A`` (r-k, in), ``B`` (out, r-k) and ``d`` (r-k+L*k,). They are
    float32 unless ``adapter_dtype`` says otherwise, and are cast to the activations' dtype on use.
    ``pool`` is the group's pool, or None if the method has none (k = 0).

    ``patch_model`` makes these layers; it is rarely useful to make one directly.

    Args:
        base_layer: any linear layer, also a quantized one.
        config: the method's config, which defines the layer's tensors.
        spec: the layer's index in the group, shape and device.
        pool: the group's pool.
        packs: the group's packs.

    Raises:
        RuntimeError: in a forward, the adapter is sharded over processes; or it is merged, and the
            forward is for training, with grad.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> layers = [m for m in model.modules() if isinstance(m, rasa_ext.RasaLinear)]
        >>> layer = layers[0]
        >>> layer.A.shape == (7, layer.in_features), layer.B.shape == (layer.out_features, 7)
        (True, True)
        >>> layer.d.shape == (layer.effective_rank,)
        True
    """

    def __init__(
        self,
        base_layer: LinearLayer,
        config: Method,
        spec: LayerSpec,
        pool: RasaPool | None,
        packs: PackSet,
    ) -> None:
        super().__init__(base_layer)
        self.own(config, spec, pool, packs)
        self.train(base_layer.training)

    def adapters(self) -> Iterator[Adapter]:
        """Return the layer's only adapter."""
        yield self.adapter()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the adapter is currently merged into the base's weight."""
        return self.merged_base is not None

    def extra_repr(self) -> str:
        """Return widths and ranks, for ``repr``."""
        out_features, in_features = linear_shape(self.base_layer)
        state = ", merged" if self.merged else ""
        return (
            f"in_features={in_features}, out_features={out_features}, "
            f"effective_rank={self.effective_rank}{state}"
        )


class SplitRasaLinear(SplitLinear, RasaLinear):
    """A RasaLinear over a base layer that is split over processes."""

    def own(self, *args: Any) -> None:
        """Register tensors that every process has."""
        super().own(*args)
        self.share(self.adapter())
