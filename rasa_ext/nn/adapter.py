"""Adapter, LayerSpec, and AdaptedModule: the base class of frozen modules with adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.sharded import is_whole, what_is_here
from rasa_ext.nn.precision import restored
from rasa_ext.ops import Factors


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A layer's index in the group, and the shape and device of the base layer."""

    index: int
    """0 for the first layer of the group, after which files name the pool."""
    num_layers: int
    out_features: int
    in_features: int
    device: torch.device
    name: str = ""
    """The layer's name in the model."""
    experts: int = 0
    """How many experts a stacked weight has; 0 for a linear layer."""


class Method(Protocol):
    """The part of a config that a layer uses; see ``methods.base.AdapterConfig``."""

    @property
    def dropout(self) -> float:
        """Dropout probability of the adapter's input."""

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype of the trainable parameters."""

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make one layer's tensors, by name."""

    def factors(
        self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: LayerSpec
    ) -> Factors:
        """Return the factors of one layer from the layer's and the group's tensors."""


class Packed(NamedTuple):
    """One layer's pack, and the ports that take the gradients; None for what is not trained."""

    Ap: Tensor
    Bp: Tensor
    Ap_port: Tensor | None = None
    Bp_port: Tensor | None = None


class Packs(Protocol):
    """The packs of a group's layers; see ``nn.packs.PackSet``."""

    def take(self, adapter: Adapter, dtype: torch.dtype) -> Packed:
        """Return an adapter's pack."""

    def drop(self) -> None:
        """Drop the packs."""


class Adapter(NamedTuple):
    """One adapter of a layer: config, tensors by name, and place in the group."""

    config: Method
    own: Mapping[str, Tensor]
    pool: Mapping[str, Tensor]
    spec: LayerSpec
    owner: Any
    """The module that has the tensors, as ``packs`` knows it."""
    packs: Packs

    def sources(self) -> tuple[Tensor, ...]:
        """Return the tensors that make up the factors, in a fixed order."""
        return (*self.own.values(), *self.pool.values())

    def pack(self, dtype: torch.dtype) -> Packed:
        """Return the ``Packed`` in ``dtype``, which the layers of a group make together."""
        return self.packs.take(self, dtype)

    def factors(self) -> Factors:
        """Return the factors on the layer's device and in the layer's dtype, differentiable.

        Raises:
            RuntimeError: the tensors are sharded over processes, so that only a piece is here; or
                the group's tensors are offloaded.
        """
        factors = self.config.factors(self.own, self.pool, self.spec)
        A, A_pool, B, B_pool, d = factors
        check_whole(A=A, pool=A_pool)
        if A_pool is None or B_pool is None:
            return factors
        if A_pool.is_meta and not A.is_meta:
            raise RuntimeError(OFFLOADED)
        if A_pool.device != A.device or A_pool.dtype != A.dtype:
            return Factors(A, A_pool.to(A), B, B_pool.to(A), d)
        return factors


OFFLOADED = (
    "expected an adapter on a device, but it is offloaded; call accelerate.cpu_offload, "
    "disk_offload or dispatch_model before the model is adapted."
)


def check_whole(**matrices: Tensor | None) -> None:
    """Raise RuntimeError if an adapter's matrices, by name, are not whole in a forward."""
    for name, matrix in matrices.items():
        if matrix is not None and not is_whole(matrix):
            raise RuntimeError(
                f"expected an adapter that is whole here, but its {name} is "
                f"{what_is_here(matrix)}. In training, call the model that was sharded, not a "
                "layer; under FSDP1 use checkpoints of use_reentrant=False; use "
                "peft.get_peft_model, not add_adapter. Else save the adapter and load it into a "
                "whole model."
            )


class AdaptedModule(nn.Module):
    """A frozen module with adapters, which restores their dtypes and drops stale packs.

    ``patch_model`` and ``rasa_ext.peft`` replace a layer, or stacked experts, by such a module;
    ``base_layer`` is the replaced module.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> layers = [m for m in model.modules() if isinstance(m, rasa_ext.nn.AdaptedModule)]
        >>> adapter = next(layers[0].adapters())
        >>> list(adapter.own), list(adapter.pool), adapter.spec.name
        (['A', 'B', 'd'], ['A', 'B'], 'model.layers.0.self_attn.q_proj')
    """

    base_layer: Any
    unmerging = "rasa_ext.unmerge(model)"
    """The call that unmerges a model with such modules."""

    def adapters(self) -> Iterator[Adapter]:
        """Return every adapter of the module, whether or not a forward uses it.

        Returns:
            Each has ``config``, ``spec``, the layer's tensors ``own`` and the group's tensors
            ``pool`` by name; ``factors()`` returns their ``rasa_ext.methods.Factors``.
        """
        raise NotImplementedError

    def drop_pack(self) -> None:
        """Drop the packs of the adapters' groups."""
        for adapter in self.adapters():
            adapter.packs.drop()

    def check_not_trained(self) -> None:
        """Raise RuntimeError in a forward for training, which would not train a merged adapter."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                f"call {self.unmerging} first."
            )

    def restore(self) -> None:
        """Cast trainable parameters of a coarser dtype back to their config's dtype."""
        for adapter in self.adapters():
            restored(adapter.sources(), adapter.config.adapter_dtype)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode and drop cached packs; for training, also ``restore``."""
        if mode:
            self.restore()
        self.drop_pack()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module does, but without rounding values of trainable parameters."""
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Drop the pack: moving and casting may replace a parameter's memory."""
        self.drop_pack()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # nn.Module's is untyped
        return self


def drop_packs(model: nn.Module) -> None:
    """Drop a model's packs, after a write that PyTorch cannot see.

    Every forward packs anew, but for a step of ``generate``: one without grad whose cache holds
    tokens. Such a forward notices in-place operations, ``load_state_dict`` and steps of any
    ``torch.optim.Optimizer``. It does not notice collectives (``dist.broadcast(p)``), writes by
    another process to shared memory, writes through ``.data`` or a numpy view, and replays of a
    CUDA graph with the optimizer.

    Args:
        model: a model with adapters of this package, from ``patch_model`` or PEFT.

    Returns:
        Nothing.

    Raises:
        TypeError, ValueError: ``model`` is not a module, or has no adapter of this package.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> for parameter in rasa_ext.adapter_parameters(model):
        ...     _ = parameter.data.mul_(0.5)  # or torch.distributed.broadcast(parameter, src=0)
        >>> rasa_ext.drop_packs(model)
    """
    for module in adapted_modules(model):
        module.drop_pack()


def adapted_modules(model: nn.Module) -> list[AdaptedModule]:
    """List the modules with adapters; raise TypeError or ValueError if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    adapted = [module for module in model.modules() if isinstance(module, AdaptedModule)]
    if not adapted:
        raise ValueError(
            f"model: expected one with adapters of rasa_ext, got a {type(model).__name__} without."
        )
    return adapted
