"""RasaPool and RasaLinear: parameters and state. The maths is ``functional``'s."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import functional, ops, siblings
from rasa_ext.config import RasaConfig
from rasa_ext.pack_cache import PackCache
from rasa_ext.precision import HALVES, is_sharing, restored
from rasa_ext.quantized import refuse_without_gradient
from rasa_ext.sharding import is_whole, refuse_pieces
from rasa_ext.subtraction import Rest


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_plain_gemm(base: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling ``base`` is just ``x W^T + bias`` in ``dtype`` with a frozen, dense weight.

    Not so with hooks (offloading, pruning), a replaced ``forward``, quantized or sharded weights,
    a weight of another dtype, or a base that is being trained itself.
    """
    if not (type(base) is nn.Linear or is_conv1d(base)):
        return False
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != dtype:
        return False
    return bias is None or (bias.dtype == dtype and not bias.requires_grad)


def empty_factors(rank: int, out_features: int, in_features: int, base: Tensor, dtype) -> tuple:
    """A (rank, in) as LoRA draws it, uniform in +-1/sqrt(in), and B (out, rank) of zeros."""
    A = torch.empty((rank, in_features), dtype=dtype, device=base.device)
    if rank:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B = torch.zeros((out_features, rank), dtype=dtype, device=base.device)
    return nn.Parameter(A), nn.Parameter(B)


class RasaPool(nn.Module):
    """The rank pool of one group: A (L*k, in) and B (out, L*k), used by all its L layers."""

    def __init__(self, A: nn.Parameter, B: nn.Parameter) -> None:
        super().__init__()
        self.A = A
        self.B = B

    @classmethod
    def create(
        cls, config: RasaConfig, layers: int, out_features: int, in_features: int, like: Tensor
    ) -> RasaPool:
        """A fresh pool for ``layers`` layers of (out, in), on the device of ``like``."""
        size = layers * config.k
        return cls(*empty_factors(size, out_features, in_features, like, config.adapter_dtype))

    def extra_repr(self) -> str:
        """Slots of the pool."""
        return f"slots={self.A.shape[0]}"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with one adapter over it: ``base(x) + x dW^T``.

    Who owns the adapter's parameters is a subclass's affair; it answers ``tensors()``.

    Without grad the pack is cached, keyed by the parameters' versions. Writing through ``.data`` is
    invisible to that key: call ``repack()`` after it (``train()`` and ``eval()`` forget it, too).

    ``siblings``, where not None, is shared with the layers that may read the same inputs.
    """

    dropout: float

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = is_conv1d(base_layer)
        self.disabled = False
        # While merged: the weight as it was, or what subtracting would not give back of it, or the
        # quantized layer whose place a dense one took.
        self.merged_base: Tensor | Rest | nn.Module | None = None
        self.siblings: siblings.Siblings | None = None
        self._cache = PackCache()

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """``(A, A_pool, B, B_pool, d)``, wherever they lie."""
        raise NotImplementedError

    def trained(self) -> Iterator[tuple[tuple[Tensor | None, ...], torch.dtype]]:
        """Every adapter's ``tensors()``, and the dtype in which they are trained."""
        raise NotImplementedError

    def adapter(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """``(A, A_pool, B, B_pool, d)``, all on this layer's device."""
        return beside_each_other(*self.tensors())

    def versions(self) -> tuple[int, ...]:
        """How often A, B and d were written to."""
        A, _, B, _, d = self.tensors()
        return A._version, B._version, d._version

    def is_on(self, device: torch.device) -> bool:
        """Whether the base, the adapter and its pool all lie on ``device``."""
        A, A_pool, *_ = self.tensors()
        found = (self.base_layer.weight, A, *(() if A_pool is None else (A_pool,)))
        return all(tensor.device == device for tensor in found)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) to (..., out), in the dtype that the base layer would give."""
        if self.merged_base is not None or self.disabled:
            self._refuse_training_merged()
            return self._base_alone(x, args, kwargs)
        tensors = self.tensors()
        with_grad = torch.is_grad_enabled() and (x.requires_grad or any_requires_grad(tensors))
        if with_grad:
            self._forget_pack()
            if tensors[-1].dtype in HALVES:
                self._restore_together()
        dtype = _compute_dtype(x)
        base = self._modules["base_layer"]
        if args or kwargs or not is_plain_gemm(base, dtype):
            return self._over_base(x, tensors, with_grad, args, kwargs)
        drop_p = self.dropout_now()
        if drop_p == 0 and self.siblings is not None and siblings.wanted(x):
            part = self.part(dtype, beside_each_other(*tensors))
            y = self.siblings.output(self, part, x, dtype, with_grad)
            if y is not None:
                return y
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if self.transposed:
            weight = weight.t()
        if x.dtype != dtype:
            x = x.to(dtype)
        multiple = ops.rank_multiple(x.device.type, dtype, tensors[-1].shape[0])
        drop = functional.dropout(x, drop_p)
        if with_grad:
            adapter = beside_each_other(*tensors)
            return functional.rasa_linear(x, weight, bias, *adapter, multiple, *drop)
        packed = self._packed(tensors, dtype, multiple)
        y, _ = ops.low_rank_linear(functional.rows(x), weight, bias, *packed, None, *drop)
        return functional.shaped_like(y, x)

    def dropout_now(self) -> float:
        """The probability with which an element of the adapter's input is dropped at present."""
        return self.dropout if self.training else 0.0

    def part(self, dtype: torch.dtype, adapter: tuple | None = None) -> siblings.Part | None:
        """The layer as one GEMM in ``dtype`` with an adapter, or None where it is more than that.

        ``adapter``, where given, is ``adapter()``.
        """
        if self.merged_base is not None or self.disabled:
            return None
        base = self._modules["base_layer"]
        if not is_plain_gemm(base, dtype):
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        return siblings.Part(weight, bias, self.adapter() if adapter is None else adapter)

    def _over_base(
        self, x: Tensor, tensors: tuple, with_grad: bool, args: tuple, kwargs: dict
    ) -> Tensor:
        """The adapter added to whatever the base layer makes of x."""
        if x.requires_grad and torch.is_grad_enabled():
            refuse_without_gradient(self.base_layer)
        y = self.base_layer(x, *args, **kwargs)
        x = x.to(y.dtype)
        multiple = ops.rank_multiple(x.device.type, x.dtype, tensors[-1].shape[0])
        drop = functional.dropout(x, self.dropout_now())
        if with_grad or y.requires_grad:
            return functional.rasa_add(y, x, *beside_each_other(*tensors), multiple, *drop)
        packed = self._packed(tensors, y.dtype, multiple)
        out, _ = ops.low_rank_add(functional.rows(y), functional.rows(x), *packed, None, *drop)
        return functional.shaped_like(out, y)

    def _base_alone(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """What the base makes of x, in the dtype in which it did so before it became dense."""
        dtype = self.base_layer.weight.dtype
        if not isinstance(self.merged_base, nn.Module) or _compute_dtype(x) in (dtype, None):
            return self.base_layer(x, *args, **kwargs)
        return self.base_layer(x.to(dtype), *args, **kwargs).to(x.dtype)

    def _refuse_training_merged(self) -> None:
        if self.merged_base is not None and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                "call rasa_ext.unmerge(model) first."
            )

    @torch.no_grad()
    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Ap (R, in) and Bt (out, R) in ``dtype``, unpadded and without grad: dW = Bt Ap."""
        return self._pack(dtype, 1)

    def repack(self) -> None:
        """Forget the cached pack, and fill again what captured CUDA graphs read of it."""
        self._cache.refresh(self._pack)
        if self.siblings is not None:
            self.siblings.repack()

    def restore(self) -> None:
        """Give trained numbers that were cast to a coarser dtype that of their config again."""
        for tensors, dtype in self.trained():
            if restored(tensors, dtype):
                self._forget_pack()

    def _restore_together(self) -> None:
        """``restore`` in a forward, with the layers that are computed together with this one.

        What is half there may also be what FSDP computes with, whose numbers lie elsewhere.
        """
        if torch.compiler.is_compiling() or is_sharing():
            return
        for each in (self, *(() if self.siblings is None else self.siblings.layers())):
            each.restore()

    def train(self, mode: bool = True) -> AdaptedLinear:
        """Switch the mode and forget the cached pack; for training, ``restore``."""
        if mode:
            self.restore()
        self._cache.drop()
        if self.siblings is not None:
            self.siblings.forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As of any module, but nothing is rounded on its way into numbers that are trained."""
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def drop_pack(self) -> None:
        """Forget the cached pack of this layer alone."""
        self._cache.drop()

    def _forget_pack(self) -> None:
        self._cache.drop()
        if self.siblings is not None:
            self.siblings.drop_pack()

    @torch.no_grad()
    def _pack(self, dtype: torch.dtype, multiple: int) -> tuple[Tensor, Tensor]:
        return ops.pack(*self.adapter(), dtype, multiple)

    def _packed(self, tensors: tuple, dtype: torch.dtype, multiple: int) -> Sequence[Tensor]:
        """Ap, Bt without grad: from the cache while no parameter has changed.

        ``tensors`` is ``tensors()``, wherever they lie: bringing them together, and looking whether
        they are all here, waits until they are packed.
        """
        if torch.compiler.is_compiling():
            return ops.pack(*beside_each_other(*tensors), dtype, multiple)
        found = self._cache.find(tensors, dtype, multiple)
        if found is not None:
            return found
        if any(t is not None and t.is_inference() for t in tensors):
            return self._pack(dtype, multiple)
        return self._cache.get(tensors, dtype, multiple, self._pack)


class RasaLinear(AdaptedLinear):
    """A frozen linear layer with a RaSA adapter: ``base(x) + x dW^T``.

    ``A`` (r-k, in), ``B`` (out, r-k) and ``d`` (r-k+L*k,) are the layer's own; ``pool`` is its
    group's, or None where k = 0. The pool is a registered submodule of the group's first layer
    only, so that no parameter stands twice in a ``state_dict``; the other layers hold a plain
    reference, which follows through ``copy.deepcopy`` and ``torch.save``.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: RasaConfig,
        layers: int,
        pool: RasaPool | None,
        owns_pool: bool,
    ) -> None:
        """Adapt ``base_layer``, one of ``layers`` in its group; ``pool`` is None where k = 0."""
        super().__init__(base_layer)
        out_features, in_features = linear_shape(base_layer)
        own = config.rank - config.k
        weight = base_layer.weight
        self.A, self.B = empty_factors(own, out_features, in_features, weight, config.adapter_dtype)
        self.d = nn.Parameter(config.initial_diagonal(layers).to(weight.device, self.A.dtype))
        if owns_pool:
            self.pool = pool
        else:
            self.__dict__["pool"] = pool
        self.dropout = config.dropout
        self.adapter_dtype = config.adapter_dtype
        self.train(base_layer.training)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.B.shape[0]

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

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """``(A, A_pool, B, B_pool, d)``, wherever they lie."""
        pool = self._modules.get("pool") or self.__dict__.get("pool")  # as parameter_of
        A, B, d = parameter_of(self, "A"), parameter_of(self, "B"), parameter_of(self, "d")
        if pool is None:
            return A, None, B, None, d
        return A, parameter_of(pool, "A"), B, parameter_of(pool, "B"), d

    def trained(self) -> Iterator[tuple[tuple[Tensor | None, ...], torch.dtype]]:
        """As in ``AdaptedLinear``."""
        yield self.tensors(), self.adapter_dtype

    def extra_repr(self) -> str:
        """Widths and ranks."""
        state = ", merged" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"private={self.A.shape[0]}, effective_rank={self.d.shape[0]}{state}"
        )


def beside_each_other(
    A: Tensor, A_pool: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """The same with the pool on the layer's device; RuntimeError where they are pieces."""
    if not is_whole(A) or (A_pool is not None and not is_whole(A_pool)):
        refuse_pieces(A, A_pool)
    if A_pool is not None and A_pool.device != A.device:
        A_pool, B_pool = A_pool.to(A.device), B_pool.to(A.device)
    return A, A_pool, B, B_pool, d


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or Conv1D."""
    if is_conv1d(module):
        return module.nf, module.weight.shape[0]
    return module.out_features, module.in_features


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on x: autocast's, or x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """``getattr`` without nn.Module's slow lookup, since every forward of every layer does it.

    Replicas of ``nn.DataParallel`` have their parameters as plain attributes.
    """
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def any_requires_grad(adapter: tuple) -> bool:
    """Whether one of an adapter's tensors, as ``adapter()`` gives them, is being trained."""
    A, A_pool, B, B_pool, d = adapter
    if A.requires_grad or B.requires_grad or d.requires_grad:
        return True
    return A_pool is not None and (A_pool.requires_grad or B_pool.requires_grad)
