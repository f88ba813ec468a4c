"""Adapters under tensor parallelism: every process has the whole adapter and a part of the base.

For a base cut by rows, a process uses the matching rows of B; for a base cut by columns, the
matching columns of A. Nothing else of the adapter is cut. So each process adds its part of dW, and
the sum of y over processes, which a cut by columns needs anyway, includes the adapter.

    by rows:     y_p = x W_p^T + (x A^T) diag(d) B_p^T            dx = sum over p
    by columns:  y = sum over p of x_p W_p^T + (x_p A_p^T) diag(d) B^T

Each process's gradient of A, B and d is one summand of the true gradient. It is multiplied by the
number of processes, so that the mean over all processes, which data parallelism and uncut layers
need, equals the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rasa_ext.base_layers.split import Split, local_part, split_of
from rasa_ext.nn.adapted_linear import AdaptedLinear, compute_dtype
from rasa_ext.nn.adapter import Adapter
from rasa_ext.nn.functional import Function
from rasa_ext.ops import Factors


class SplitLinear(AdaptedLinear):
    """An adapted linear layer that is split over processes, by ``split_of(base_layer)``.

    A mixin, placed before the class that owns the adapter's tensors.
    """

    averaged = False
    """Whether a backward averages gradients over processes at the end."""

    def _over_base(
        self,
        x: Tensor,
        adapter: Adapter,
        sources: tuple[Tensor, ...],
        with_grad: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Compute this process's rows of y, or the sum over processes.

        Replaces the base's forward, so that a sum over processes includes base and adapter.
        """
        if with_grad and not self.averaged and any(each.requires_grad for each in sources):
            raise RuntimeError(
                "expected an adapter whose gradients are averaged over processes, since each has a "
                "part of the base; call rasa_ext.distributed.replicate_adapter(model) after "
                "patching."
            )
        split = split_of(self.base_layer)
        assert split is not None  # patching uses this class only for split layers
        dtype = compute_dtype(x)
        weight, bias = local_part(self.base_layer, dtype)
        x, added = x.to(dtype), None
        if split.dim == 0:
            x, added = _shared(x, split), bias

        def factors() -> Factors:
            return _part_of(adapter.factors(), split)

        p = adapter.config.dropout if self.training else 0.0
        y = self._adapted(x, weight, added, factors, p, sources, with_grad)
        if split.dim == 0:
            return y
        total: Tensor = _Summed.apply(y, split.group)  # every process has the whole gradient
        return total if bias is None else total + bias


def _part_of(factors: Factors, split: Split) -> Factors:
    """Return this process's factors of dW; gradients are multiplied by the number of processes."""
    A, A_pool, B, B_pool, d = factors

    def cut(tensor: Tensor | None, dim: int | None) -> Any:
        return None if tensor is None else _Part.apply(tensor, split, dim)

    rows, columns = (0, None) if split.dim == 0 else (None, 1)
    return Factors(
        cut(A, columns), cut(A_pool, columns), cut(B, rows), cut(B_pool, rows), cut(d, None)
    )


def _shared(x: Tensor, split: Split) -> Tensor:
    """Return x (..., in), equal on all processes; a backward sums the gradients over processes."""
    needed = torch.is_grad_enabled() and x.requires_grad
    return _Shared.apply(x, split.group) if needed else x


class _Part(Function):
    """Select rows or columns of a tensor, or the whole tensor if ``dim`` is None."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, split: Split, dim: int | None) -> Tensor:
        ctx.split, ctx.dim, ctx.like = split, dim, (whole.shape, whole.stride())
        if dim is None:
            return whole.view_as(whole)
        here = whole.narrow(dim, split.start, split.stop - split.start)
        return here.t().contiguous().t() if dim == 0 else here.contiguous()  # ranks are rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split = ctx.split
        if ctx.dim is None:
            return grad * split.processes, None, None
        whole = torch.empty_strided(*ctx.like, dtype=grad.dtype, device=grad.device).zero_()
        here = whole.narrow(ctx.dim, split.start, split.stop - split.start)
        torch.mul(grad, split.processes, out=here)
        return whole, None, None


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
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
