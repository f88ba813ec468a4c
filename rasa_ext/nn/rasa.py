"""RasaLinear and RasaPool: a layer with an adapter, and what the layers of a group share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from rasa_ext.base_layers.linear import LinearLayer, linear_shape
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.adapter import Adapter, LayerSpec, Method
from rasa_ext.nn.packs import PackSet
from rasa_ext.nn.split import SplitLinear


class RasaPool:
    """The shared rank pool of one group of L layers: under RaSA A (L*k, in) and B (out, L*k).

    They are A_S and B_S of arXiv 2503.12576, section 3. ``patch_model`` makes one pool for each
    group. The tensors are parameters of the nearest module that runs all layers of the group, such
    as ``model.model`` of a Llama, and so belong to whatever walks, copies, saves or shards that
    module. Layers refer to the pool.

    Args:
        tensors: the tensors by name; Parameters are trained, others become buffers.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> layers = [m for m in model.modules() if isinstance(m, rasa_ext.RasaLinear)]
        >>> layers[0].pool.A is model.model.rasa_pool_0_A
        True
        >>> group = [layer for layer in layers if layer.pool is layers[0].pool]
        >>> layers[0].pool.A.shape == (len(group), layers[0].in_features)
        True
    """

    A: Tensor
    B: Tensor
    _home: Callable[[], Any] = type(None)
    """A weak reference to the module, which would be a cycle; None in a copy that has not run."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # The module's dictionaries, so that copies of both belong together.
        self._parameters: dict[str, Any] = {}
        self._buffers: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._prefix = ""
        self.replace(tensors)

    def move(self, module: nn.Module | None, prefix: str = "") -> None:
        """Move the tensors to a module, where their names begin with ``prefix``; None: to none."""
        tensors = self.tensors()
        self.replace({})
        parameters, buffers = ({}, {}) if module is None else (module._parameters, module._buffers)
        self._parameters, self._buffers, self._prefix = parameters, buffers, prefix
        self._home = type(None) if module is None else weakref.ref(module)
        self.replace(tensors)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Remember the module as its forward begins, also if it is a copy: a hook."""
        if not is_compiling():
            self._home = weakref.ref(module)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors by these."""
        for key in self._names.values():
            self._parameters.pop(key, None)
            self._buffers.pop(key, None)
        self._names = {name: f"{self._prefix}{name}" for name in tensors}
        for name, tensor in tensors.items():
            of = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
            of[self._names[name]] = tensor

    def tensors(self) -> dict[str, Any]:
        """Return the tensors by name."""
        try:
            return {name: self._parameters[key] for name, key in self._names.items()}
        except KeyError:  # a buffer, parametrized, or FSDP1's in a checkpoint's second forward
            known, home = {**self._parameters, **self._buffers}, self._home()
            return {
                name: known[key] if key in known else getattr(home, key)
                for name, key in self._names.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_home"}

    def __getattr__(self, name: str) -> Any:
        """Return a tensor by name."""
        if name in self.__dict__.get("_names", ()):
            return self.tensors()[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        """Show the shapes by name."""
        shapes = (f"{name}={tuple(tensor.shape)}" for name, tensor in self.tensors().items())
        return f"{type(self).__name__}({', '.join(shapes)})"


class AdapterOwner(nn.Module):
    """A module that owns an adapter's tensors as attributes and refers to the group's pool."""

    A: Tensor
    B: Tensor
    d: Tensor
    pool: RasaPool | None
    _names: tuple[str, ...] = ()

    def begin(self, config: Method, spec: LayerSpec, pool: RasaPool | None, packs: PackSet) -> None:
        """Register the tensors that ``config`` makes for a layer, and the group's ``pool``."""
        self.config, self.spec, self.packs, self.pool = config, spec, packs, pool
        packs.join(spec.index, self)
        self.replace(config.layer_tensors(spec))

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the private tensors by these: Parameters are trained, others are buffers."""
        for name in self._names:
            delattr(self, name)
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Any]:
        """Look up the private tensors by name in nn.Module's dictionaries.

        ``getattr`` is slow, and every forward of every layer calls this.
        """
        tensors: dict[str, Any] = self._parameters
        if self._buffers:
            tensors = {**tensors, **self._buffers}
        # Parametrized, a replica of nn.DataParallel, or a layer alone in its group, with the pool.
        if len(tensors) != len(self._names):
            tensors = {name: getattr(self, name) for name in self._names}
        return tensors

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
        self.begin(config, spec, pool, packs)
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

    def begin(self, *args: Any) -> None:
        """Register tensors that every process has."""
        super().begin(*args)
        self.share(self.adapter())
