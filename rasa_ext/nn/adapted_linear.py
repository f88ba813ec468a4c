"""AdaptedLinear: a frozen linear layer with an adapter of any method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from rasa_ext import ops
from rasa_ext.base_layers.linear import LinearLayer, as_plain_gemm, is_conv1d, linear_shape
from rasa_ext.base_layers.quantized import check_gradient
from rasa_ext.nn import functional, functional_cpu
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.fused_projections import FusedProjections, Projection
from rasa_ext.nn.pack_cache import PackCache
from rasa_ext.nn.precision import HALVES, is_sharing
from rasa_ext.nn.shapes import count_tokens, flatten_tokens, unflatten_like
from rasa_ext.ops import Factors, Pack


class AdaptedLinear(AdaptedModule):
    """A frozen linear layer with one adapter over it: ``base(x) + x dW^T``.

    A subclass owns the adapter's tensors and implements ``adapter()``.

    Without grad the pack is cached, keyed by identity and version of the adapter's tensors. Writes
    through ``.data`` do not change that key; ``train()``, ``eval()`` and any forward with grad
    drop the pack.

    ``fused``, if not None, is shared by the projections that read one input.
    """

    base_layer: LinearLayer

    def __init__(self, base_layer: LinearLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = is_conv1d(base_layer)
        self.disabled = False
        # While merged: the original weight, or the part that subtracting dW would not restore, or
        # the quantized layer that a dense one replaced.
        self.merged_base: Any = None
        self.fused: FusedProjections | None = None
        self._cache = PackCache()

    def adapter(self) -> Adapter | None:
        """Return the adapter that a forward adds to the base's output, or None."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """Dropout probability of the adapter's input in training."""
        adapter = self.adapter()
        return 0.0 if adapter is None else adapter.config.dropout

    @property
    def in_features(self) -> int:
        """Number of input features."""
        return linear_shape(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        """Number of output features."""
        return linear_shape(self.base_layer)[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute y (..., out) from x (..., in), in the base layer's output dtype."""
        # On a CPU, every Python call here shows in the time of a step.
        adapter = None if self.disabled or self.merged_base is not None else self.adapter()
        if adapter is None:
            return self._base_alone(x, args, kwargs)
        sources = adapter.sources()
        with_grad = torch.is_grad_enabled() and (
            x.requires_grad or any(source.requires_grad for source in sources)
        )
        if with_grad:
            self._cache.drop()
            if sources[0].dtype in HALVES:
                self._restore_together()
        dtype = compute_dtype(x)
        plain = None
        if not (args or kwargs):
            plain = as_plain_gemm(self._modules["base_layer"], dtype)
        if plain is None:
            return self._over_base(x, adapter, sources, with_grad, args, kwargs)
        p = adapter.config.dropout if self.training else 0.0
        # With dropout also without grad: a re-entrant checkpoint must draw equal masks twice.
        fused = self.fused if with_grad or p else None
        if fused is not None and not is_compiling() and ops.fuse_projections(x):
            part = Projection(*plain, sources, adapter.factors, p)
            y = fused.output(self, part, x, dtype)
            if y is not None:
                return y
        if x.dtype != dtype:
            x = x.to(dtype)
        return self._adapted(x, *plain, adapter.factors, p, sources, with_grad)

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """Return the layer as a projection to fuse with others, computed in ``dtype``.

        None if the layer is more than a GEMM with an adapter.
        """
        adapter = self._live_adapter()
        plain = None if adapter is None else as_plain_gemm(self._modules["base_layer"], dtype)
        if adapter is None or plain is None:
            return None
        dropout = adapter.config.dropout if self.training else 0.0
        return Projection(*plain, adapter.sources(), adapter.factors, dropout)

    def _live_adapter(self) -> Adapter | None:
        """Return ``adapter()``, or None if the adapter is disabled or merged."""
        if self.merged_base is not None or self.disabled:
            return None
        return self.adapter()

    def _over_base(
        self,
        x: Tensor,
        adapter: Adapter,
        sources: tuple[Tensor, ...],
        with_grad: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run the base layer on x and add the adapter."""
        if x.requires_grad and torch.is_grad_enabled():
            check_gradient(self.base_layer)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return self._added(y, x, adapter, sources, with_grad or y.requires_grad)

    def _added(
        self,
        y: Tensor,
        x: Tensor,
        adapter: Adapter,
        sources: tuple[Tensor, ...] = (),
        with_grad: bool = True,
    ) -> Tensor:
        """Compute ``y + x dW^T``; without grad, use the cached pack of ``sources``."""
        p = adapter.config.dropout if self.training else 0.0
        x = x.to(y.dtype)
        return self._adapted(x, None, None, adapter.factors, p, sources, with_grad, y)

    def _adapted(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        make_factors: Callable[[], Factors],
        p: float,
        sources: tuple[Tensor, ...],
        with_grad: bool,
        y: Tensor | None = None,
    ) -> Tensor:
        """Compute ``x W^T + bias + x dW^T``, or ``y + x dW^T`` for a base output y."""
        if with_grad and not p and ops.torch_differentiates(x) and not is_compiling():
            return functional_cpu.adapted_linear(x, weight, bias, make_factors(), y)
        mask, x_dropped, scale = functional.dropout(x, p)
        if with_grad:
            factors = make_factors()
            multiple = ops.rank_multiple(x.device.type, x.dtype, factors.rank, count_tokens(x))
            drop = mask, x_dropped, scale
            return functional.adapted_linear(x, weight, bias, factors, multiple, *drop, y)
        pack, rows = self._packed(make_factors, sources, x.dtype, x.device), flatten_tokens(x)
        if y is not None:
            out, _ = ops.low_rank_add(flatten_tokens(y), rows, *pack, x_dropped, scale)
        else:
            assert weight is not None
            out, _ = ops.low_rank_linear(rows, weight, bias, *pack, x_dropped, scale)
        return unflatten_like(out, x)

    def _base_alone(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the base on x, in the dtype of the base before it was dequantized."""
        if self.merged_base is not None and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                "call rasa_ext.unmerge(model) first."
            )
        base = self.base_layer
        if isinstance(self.merged_base, nn.Module) and compute_dtype(x) != base.weight.dtype:
            dense: Tensor = base(x.to(base.weight.dtype), *args, **kwargs)
            return dense.to(x.dtype)
        y: Tensor = base(x, *args, **kwargs)
        return y

    @torch.no_grad()
    def packed_factors(self, dtype: torch.dtype = torch.float32) -> Pack:
        """Return Ap (R, in) and Bp (R, out) in ``dtype``, unpadded, without grad: dW = Bp^T Ap."""
        adapter = self.adapter()
        if adapter is None:
            raise RuntimeError("expected a layer with an active adapter, got one without.")
        return Pack(*ops.pack(*adapter.factors(), dtype, 1))

    def _restore_together(self) -> None:
        """Restore dtypes in a forward, also in the layers fused with this one.

        Half-precision tensors may also be FSDP's copies for compute, which stay.
        """
        if is_compiling() or is_sharing():
            return
        for each in (self, *(() if self.fused is None else self.fused.layers())):
            each.restore()

    def drop_pack(self) -> None:
        """Drop the cached pack."""
        self._cache.drop()
        if self.fused is not None:
            self.fused.forget()

    def _packed(
        self,
        make_factors: Callable[[], Factors],
        sources: tuple[Tensor, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Return Ap and Bp without grad, from the cache if no source has changed."""

        def make() -> tuple[Tensor, Tensor]:
            factors = make_factors()
            multiple = ops.rank_multiple(device.type, dtype, factors.rank)
            return ops.pack(*factors, dtype, multiple)

        if is_compiling():
            return make()
        return self._cache.get(sources, (dtype, device), make)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes: autocast's, or the dtype of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
