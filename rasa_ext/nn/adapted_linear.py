"""AdaptedLinear: a frozen linear layer with an adapter of any method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from rasa_ext import ops
from rasa_ext.base_layers.linear import (
    LinearLayer,
    as_plain_gemm,
    compute_dtype,
    is_conv1d,
    linear_shape,
    stored_weight,
)
from rasa_ext.nn.adapter import AdaptedModule, Adapter
from rasa_ext.nn.functional import dropout, low_rank_linear
from rasa_ext.nn.fused_projections import FusedProjections, Projection


class AdaptedLinear(AdaptedModule):
    """A frozen linear layer with one adapter over it: ``base(x) + x dW^T``.

    A subclass owns the adapter's tensors and implements ``adapter()``.

    ``fused``, if not None, is shared by the projections that read one input.
    """

    base_layer: LinearLayer

    def __init__(self, base_layer: LinearLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = is_conv1d(base_layer)
        self.disabled = False
        # While merged: the original weight, or the quantized layer that a dense one replaced.
        self.merged_base: Any = None
        self.fused: FusedProjections | None = None
        self.is_dense_head = False  # the model's output embedding, not quantized

    def adapter(self) -> Adapter | None:
        """Return the adapter that a forward adds to the base's output, or None."""
        raise NotImplementedError

    def live_adapters(self) -> list[Adapter]:
        """Return the adapters that a forward adds to all rows."""
        adapter = None if self.disabled or self.merged_base is not None else self.adapter()
        return [] if adapter is None else [adapter]

    @property
    def weight(self) -> Tensor:
        """The tensor that holds the base's weight, for code that reads the dtype or device.

        An output head gives a differentiable W + dW instead, since fused losses, such as TRL's and
        Liger's, compute with the weight and do not call the layer. Dropout has no part in it.
        """
        weight = stored_weight(self.base_layer)
        for adapter in self.live_adapters() if self.is_dense_head else ():
            Ap, Bp = ops.differentiable_pack(adapter.factors(), weight.dtype)
            weight = torch.addmm(weight.to(Ap.dtype), Bp.mT, Ap).to(weight.dtype)
        return weight

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
        dtype = compute_dtype(x)
        plain = None
        if not (args or kwargs):
            plain = as_plain_gemm(self._modules["base_layer"], dtype)
        if plain is None:
            return self._over_base(x, adapter, args, kwargs)
        p = self._dropout_of(adapter)
        # With dropout also without grad: a re-entrant checkpoint must draw equal masks twice.
        fused = self.fused if torch.is_grad_enabled() or p else None
        if fused is not None and not is_compiling() and ops.fuse_projections(x):
            y = fused.output(self, Projection(*plain, adapter, p), x, dtype)
            if y is not None:
                return y
        if x.dtype != dtype:
            x = x.to(dtype)
        return low_rank_linear(x, *plain, adapter.pack(dtype), dropout(x, p))

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """Return the layer as a projection to fuse with others, computed in ``dtype``.

        None if the layer is more than a GEMM with an adapter.
        """
        adapter = None if self.disabled or self.merged_base is not None else self.adapter()
        plain = None if adapter is None else as_plain_gemm(self._modules["base_layer"], dtype)
        if adapter is None or plain is None:
            return None
        return Projection(*plain, adapter, self._dropout_of(adapter))

    def _dropout_of(self, adapter: Adapter) -> float:
        return adapter.config.dropout if self.training else 0.0

    def _over_base(
        self, x: Tensor, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Run the base layer on x and add the adapter."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return self._added(y, x, adapter)

    def _added(self, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
        """Compute ``y + x dW^T``."""
        x = x.to(y.dtype)
        pack = adapter.pack(x.dtype)
        return low_rank_linear(x, None, None, pack, dropout(x, self._dropout_of(adapter)), y)

    def _base_alone(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the base on x, in the dtype of the base before it was dequantized."""
        if self.merged_base is not None:
            self.check_not_trained()
        base = self.base_layer
        if isinstance(self.merged_base, nn.Module) and compute_dtype(x) != base.weight.dtype:
            dense: Tensor = base(x.to(base.weight.dtype), *args, **kwargs)
            return dense.to(x.dtype)
        y: Tensor = base(x, *args, **kwargs)
        return y

    def drop_pack(self) -> None:
        """Drop the packs, and outputs of fused projections."""
        super().drop_pack()
        if self.fused is not None:
            self.fused.forget()
