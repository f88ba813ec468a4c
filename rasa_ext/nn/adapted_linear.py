"""AdaptedLinear: a frozen linear layer with an adapter over it, whatever the adapter's method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from rasa_ext import ops
from rasa_ext.base_layers.linear import LinearLayer, as_plain_gemm, is_conv1d, linear_shape
from rasa_ext.base_layers.quantized import check_gradient
from rasa_ext.base_layers.sharded import is_dtensor
from rasa_ext.base_layers.split import Split, local_part, split_of
from rasa_ext.nn import composed, functional
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.fused_projections import FusedProjections, Projection
from rasa_ext.nn.pack_cache import PackCache
from rasa_ext.nn.precision import HALVES, is_sharing
from rasa_ext.nn.shapes import count_tokens, flatten_tokens, unflatten_like
from rasa_ext.nn.split import part_of, shared, summed
from rasa_ext.ops import Factors, Pack


class AdaptedLinear(AdaptedModule):
    """A frozen linear layer with one adapter over it: ``base(x) + x dW^T``.

    Who owns the adapter's tensors is a subclass's affair; it answers ``adapter()``.

    Without grad the pack is cached, keyed by identity and version of the adapter's tensors. Writing
    through ``.data`` is invisible to that key; ``train()``, ``eval()`` and any forward with grad
    forget the pack.

    ``fused``, where not None, is shared with the projections that read the same inputs.
    """

    base_layer: LinearLayer

    def __init__(self, base_layer: LinearLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = is_conv1d(base_layer)
        self.disabled = False
        # While merged: the weight as it was, or what subtracting would not give back of it, or the
        # quantized layer whose place a dense one took.
        self.merged_base: Any = None
        self.fused: FusedProjections | None = None
        self.averaged = False  # whether a backward ends with a mean of gradients over processes
        self._cache = PackCache()

    def adapter(self) -> Adapter | None:
        """Give the adapter that a forward adds to the base's output, or None."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """The probability with which an element of the adapter's input is dropped in training."""
        adapter = self.adapter()
        return 0.0 if adapter is None else adapter.config.dropout

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return linear_shape(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return linear_shape(self.base_layer)[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute y (..., out) from x (..., in), in the dtype that the base layer would give."""
        # On a CPU, every function that Python calls here is seen in a step's time.
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
        dtype = _compute_dtype(x)
        plain = None
        if not (args or kwargs):
            plain = as_plain_gemm(self._modules["base_layer"], dtype)
        if plain is None:
            return self._over_base(x, adapter, sources, with_grad, args, kwargs)
        p = adapter.config.dropout if self.training else 0.0
        # With dropout also without grad: a re-entrant checkpoint must draw the same masks twice.
        eager = (with_grad or p > 0) and not is_compiling()  # without either it does not matter
        fused = self.fused if eager else None
        if fused is not None and ops.fuse_projections(x) and not x.is_inference():
            part = Projection(*plain, sources, adapter.factors, p)
            y = fused.output(self, part, x, dtype)
            if y is not None:
                return y
        if x.dtype != dtype:
            x = x.to(dtype)
        if with_grad and eager and not p and ops.torch_differentiates(x):
            return composed.adapted_linear(x, *plain, adapter.factors())
        mask, kept, scale = functional.dropout(x, p) if p else (None, None, 1.0)
        if with_grad:
            factors = adapter.factors()
            multiple = _rank_multiple(x, factors)
            return functional.adapted_linear(x, *plain, factors, multiple, mask, kept, scale)
        pack = self._packed(adapter, sources, dtype, x.device)
        y, _ = ops.low_rank_linear(flatten_tokens(x), *plain, *pack, kept, scale)
        return unflatten_like(y, x)

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """Give the layer as one of several that read one input, computed in ``dtype`` together.

        None where it is more than a GEMM with an adapter.
        """
        adapter = self._live_adapter()
        plain = None if adapter is None else as_plain_gemm(self._modules["base_layer"], dtype)
        if adapter is None or plain is None:
            return None
        dropout = adapter.config.dropout if self.training else 0.0
        return Projection(*plain, adapter.sources(), adapter.factors, dropout)

    def _live_adapter(self) -> Adapter | None:
        """Give ``adapter()``, unless it is disabled or merged."""
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
        """Add the adapter to whatever the base layer makes of x."""
        if is_dtensor(self.base_layer.weight) and (split := split_of(self.base_layer)):
            return self._over_part(x, adapter, sources, with_grad, split)
        if x.requires_grad and torch.is_grad_enabled():
            check_gradient(self.base_layer)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if with_grad or y.requires_grad:
            return self._added(y, x, adapter)
        x = x.to(y.dtype)
        drop = functional.dropout(x, adapter.config.dropout if self.training else 0.0)
        pack = self._packed(adapter, sources, y.dtype, y.device)
        rows = flatten_tokens(y), flatten_tokens(x)
        out, _ = ops.low_rank_add(*rows, *pack, *drop[1:])
        return unflatten_like(out, y)

    def _over_part(
        self,
        x: Tensor,
        adapter: Adapter,
        sources: tuple[Tensor, ...],
        with_grad: bool,
        split: Split,
    ) -> Tensor:
        """Compute this process's part of y, or its summand and the sum; see ``nn.split``.

        In place of the base's own forward, whose sums over processes have both summands then.
        """
        if with_grad and not self.averaged and any(each.requires_grad for each in sources):
            raise RuntimeError(
                "expected an adapter whose gradients are averaged over processes, since each has a "
                "part of the base; call rasa_ext.distributed.replicate_adapter(model) after "
                "patching."
            )
        dtype = _compute_dtype(x)
        weight, bias = local_part(self.base_layer, dtype)
        x = x.to(dtype)
        by_rows = split.dim == 0
        if by_rows:
            x = shared(x, split)
        added = bias if by_rows else None
        mask, kept, scale = functional.dropout(x, adapter.config.dropout if self.training else 0.0)
        if with_grad:
            factors = part_of(adapter.factors(), split)
            multiple = _rank_multiple(x, factors)
            y = functional.adapted_linear(x, weight, added, factors, multiple, mask, kept, scale)
        else:
            pack = self._packed(adapter, sources, dtype, x.device, split)
            rows = flatten_tokens(x)
            out, _ = ops.low_rank_linear(rows, weight, added, *pack, kept, scale)
            y = unflatten_like(out, x)
        if by_rows:
            return y
        y = summed(y, split)
        return y if bias is None else y + bias

    def _added(self, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
        """Compute ``y + x dW^T``, differentiable."""
        x = x.to(y.dtype)
        drop = functional.dropout(x, adapter.config.dropout if self.training else 0.0)
        factors = adapter.factors()
        if drop[0] is None and not is_compiling() and ops.torch_differentiates(x):
            return composed.adapted_add(y, x, factors)
        return functional.adapted_add(y, x, factors, _rank_multiple(x, factors), *drop)

    def _base_alone(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the base on x, in the dtype in which it ran before it was dequantized."""
        if self.merged_base is not None and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the base weights, so it would not be trained; "
                "call rasa_ext.unmerge(model) first."
            )
        base = self.base_layer
        if isinstance(self.merged_base, nn.Module) and _compute_dtype(x) != base.weight.dtype:
            dense: Tensor = base(x.to(base.weight.dtype), *args, **kwargs)
            return dense.to(x.dtype)
        y: Tensor = base(x, *args, **kwargs)
        return y

    @torch.no_grad()
    def packed_factors(self, dtype: torch.dtype = torch.float32) -> Pack:
        """Pack to Ap (R, in), Bp (R, out) in ``dtype``, unpadded, without grad: dW = Bp^T Ap."""
        adapter = self.adapter()
        if adapter is None:
            raise RuntimeError("expected a layer with an active adapter, got one without.")
        return Pack(*ops.pack(*adapter.factors(), dtype, 1))

    def _restore_together(self) -> None:
        """``restore`` in a forward, with the layers that are computed together with this one.

        What is half there may also be what FSDP computes with, whose parameters lie elsewhere.
        """
        if is_compiling() or is_sharing():
            return
        for each in (self, *(() if self.fused is None else self.fused.layers())):
            each.restore()

    def drop_pack(self) -> None:
        """Forget the cached pack."""
        self._cache.drop()
        if self.fused is not None:
            self.fused.forget()

    def _packed(
        self,
        adapter: Adapter,
        sources: tuple[Tensor, ...],
        dtype: torch.dtype,
        device: torch.device,
        split: Split | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give Ap and Bp without grad, from the cache while no source has changed."""

        def make() -> tuple[Tensor, Tensor]:
            factors = adapter.factors()
            if split is not None:
                factors = part_of(factors, split)
            multiple = ops.rank_multiple(device.type, dtype, factors.rank)
            return ops.pack(*factors, dtype, multiple)

        if is_compiling():
            return make()
        return self._cache.get(sources, (dtype, device), make)


def _rank_multiple(x: Tensor, factors: Factors) -> int:
    """Choose the padding of a pack that is made for x (..., in) alone."""
    tokens = count_tokens(x)
    return ops.rank_multiple(x.device.type, x.dtype, factors.rank, tokens)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Give the dtype in which a linear layer computes on x: autocast's, or x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
