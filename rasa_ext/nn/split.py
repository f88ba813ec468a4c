"""An adapter that is whole on every process, over a base layer of which each has a part.

Of a base that is cut by rows the process uses the same rows of B, and of one that is cut by columns
the same columns of A; nothing else of the adapter is cut. So dW's part is that of the whole dW, and
a sum of y over processes, which a cut by columns needs in any case, has the adapter's in it.

    by rows:     y_p = x W_p^T + (x A^T) diag(d) B_p^T            dx = sum over p
    by columns:  y = sum over p of x_p W_p^T + (x_p A_p^T) diag(d) B^T

Each process's gradient of A, B and d is one summand of the true one. Here it is multiplied by their
number, so that the mean over all processes, which is what layers want that are not cut, and data
parallelism, is the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rasa_ext.base_layers.split import Split
from rasa_ext.nn.functional import Function
from rasa_ext.ops import Factors


def part_of(factors: Factors, split: Split) -> Factors:
    """Give the factors of this process's part of dW, with gradients times the processes."""
    A, A_pool, B, B_pool, d = factors

    def cut(tensor: Tensor | None, dim: int | None) -> Any:
        return None if tensor is None else _Part.apply(tensor, split, dim)

    rows, columns = (0, None) if split.dim == 0 else (None, 1)
    return Factors(
        cut(A, columns), cut(A_pool, columns), cut(B, rows), cut(B_pool, rows), cut(d, None)
    )


def shared(x: Tensor, split: Split) -> Tensor:
    """Give x (..., in), the same on all processes, whose gradients a backward sums over them."""
    needed = torch.is_grad_enabled() and x.requires_grad
    return _Shared.apply(x, split.group) if needed else x


def summed(y: Tensor, split: Split) -> Tensor:
    """Sum y (..., out) over the processes, in place; each has the whole gradient already."""
    total: Tensor = _Summed.apply(y, split.group)
    return total


class _Part(Function):
    """Rows or columns of a tensor, or all of it where ``dim`` is None."""

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
        grad = grad.contiguous()  # what one layer's backward has just made, and nothing else reads
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
