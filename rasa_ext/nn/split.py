"""Adapters under tensor parallelism: every process has the whole adapter and a part of the base.

For a base cut by rows, a process uses the matching rows of B; for a base cut by columns, the
matching columns of A. Nothing else of the adapter is cut. So each process adds its part of dW, and
the sum of y over processes, which a cut by columns needs anyway, includes the adapter.

    by rows:     y_p = x W_p^T + (x A^T) diag(d) B_p^T            dx = sum over p
    by columns:  y = sum over p of x_p W_p^T + (x_p A_p^T) diag(d) B^T

Each process's gradient of a pack is one summand of the true gradient. A backward sums them, so
that every process has the whole gradient of A, B, d and the pool.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rasa_ext.base_layers.linear import compute_dtype
from rasa_ext.base_layers.split import Split, local_part, split_of
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.adapter import Adapter, Packed
from rasa_ext.nn.function import Function, first_order
from rasa_ext.nn.functional import dropout, low_rank_linear


class SplitLinear(AdaptedLinear):
    """An adapted linear layer that is split over processes, by ``split_of(base_layer)``.

    A mixin, placed before the class that owns the adapter's tensors.
    """

    def share(self, adapter: Adapter) -> None:
        """Give every process the first one's fresh values."""
        split = split_of(self.base_layer)
        assert split is not None  # patching uses this class only for split layers
        for tensor in (source for source in adapter.sources() if not source.is_meta):
            dist.broadcast(tensor.detach(), group=split.group, group_src=0)

    def _over_base(
        self, x: Tensor, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Compute this process's rows of y, or the sum over processes.

        Replaces the base's forward, so that a sum over processes includes base and adapter.
        """
        split = split_of(self.base_layer)
        assert split is not None  # patching uses this class only for split layers
        dtype = compute_dtype(x)
        weight, bias = local_part(self.base_layer, dtype)
        pack = adapter.pack(dtype)
        x, added = x.to(dtype), None
        if split.dim == 0:
            x, added = _shared_input(x, split), bias
        dropped = dropout(x, self._dropout_of(adapter))
        y = low_rank_linear(x, weight, added, _part_of(pack, split), dropped)
        if split.dim == 0:
            return y
        total: Tensor = _Summed.apply(y, split.group)  # every process has the whole gradient
        return total if bias is None else total + bias


def _part_of(pack: Packed, split: Split) -> Packed:
    """Return this process's part of a pack; gradients are summed over the processes."""
    Ap, Bp, Ap_port, Bp_port = pack
    if split.dim == 0:
        Bp = Bp[:, split.start : split.stop]
    else:
        Ap = Ap[:, split.start : split.stop]
    cut = split.dim != 0, split.dim == 0
    ports = (
        None if port is None else _Part.apply(port, split, columns)
        for port, columns in zip((Ap_port, Bp_port), cut, strict=True)
    )
    return Packed(Ap, Bp, *ports)


def _shared_input(x: Tensor, split: Split) -> Tensor:
    """Return x (..., in), equal on all processes; a backward sums the gradients over processes."""
    needed = torch.is_grad_enabled() and x.requires_grad
    return _Shared.apply(x, split.group) if needed else x


class _Part(Function):
    """Select this process's columns of a pack's port, or all; a backward sums over processes."""

    @staticmethod
    def forward(ctx: Any, port: Tensor, split: Split, columns: bool) -> Tensor:
        ctx.split, ctx.columns, ctx.shape = split, columns, port.shape
        return port[:, split.start : split.stop] if columns else port.view_as(port)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = grad.new_zeros(ctx.shape)
        (whole[:, ctx.split.start : ctx.split.stop] if ctx.columns else whole).copy_(grad)
        dist.all_reduce(whole, group=ctx.split.group)
        return whole, None, None


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()  # just made by one layer's backward; nothing else reads it
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(y, group=group)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None
