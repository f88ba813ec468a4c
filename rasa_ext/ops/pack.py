"""Packs: an adapter's parameters as the two matrices that a low-rank linear reads.

One call packs the L layers of a group, which share A_pool and B_pool. Symbols: ``in``/``out``
features, R = r - k + L*k the effective rank, Rp = R rounded up to ``multiple`` (the rows beyond R
are zero).

In a pack every rank is a row: A (r-k, in) and A_pool (L*k, in) are copied, B (out, r-k) and B_pool
(out, L*k) transposed. Parameters may have any strides; a GPU copies those that are not contiguous.
A_pool and B_pool are both None or both given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_ext.ops.library import accumulation_dtype, operator


class Factors(NamedTuple):
    """A layer's adapter: dW = [B | B_pool] diag(d) [A ; A_pool]; d = None means ones.

    With stacked experts, A, B and d have the experts as an extra first dimension, and so has a
    pool that the experts do not share.
    """

    A: Tensor
    A_pool: Tensor | None
    B: Tensor
    B_pool: Tensor | None
    d: Tensor | None

    @property
    def rank(self) -> int:
        """The effective rank R."""
        return self.A.shape[-2] + (0 if self.A_pool is None else self.A_pool.shape[-2])

    def of_expert(self, expert: int) -> Factors:
        """Return one expert's factors, with a private or a shared pool."""
        A, A_pool, B, B_pool, d = self
        if A_pool is not None and B_pool is not None and A_pool.dim() == 3:
            A_pool, B_pool = A_pool[expert], B_pool[expert]
        return Factors(A[expert], A_pool, B[expert], B_pool, None if d is None else d[expert])

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Apply ``function`` to every tensor."""
        return Factors._make(None if tensor is None else function(tensor) for tensor in self)


@operator(
    "pack_group(Tensor[] A, Tensor? A_pool, Tensor[] B, Tensor? B_pool, Tensor[] d, "
    "ScalarType dtype, int multiple=1) -> (Tensor Ap, Tensor Bp)"
)
def pack_group(
    A: Sequence[Tensor],
    A_pool: Tensor | None,
    B: Sequence[Tensor],
    B_pool: Tensor | None,
    d: Sequence[Tensor],
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return Ap = [A ; A_pool] (L, Rp, in) and Bp = diag(d) [B | B_pool]^T (L, Rp, out).

    Both are in ``dtype``; d B is rounded once. An empty list ``d`` means ones.
    """
    D = None
    if d:
        wide = torch.promote_types(torch.promote_types(B[0].dtype, d[0].dtype), dtype)
        D = torch.stack(list(d)).unsqueeze(-1).to(wide)
    up = None if B_pool is None else B_pool.t().contiguous()  # once, not for every layer
    return _rows(torch.stack(list(A)), A_pool, None, dtype, multiple), _rows(
        torch.stack(list(B)).mT, up, D, dtype, multiple
    )


def _rows(
    own: Tensor, pool: Tensor | None, D: Tensor | None, dtype: torch.dtype, multiple: int
) -> Tensor:
    """Return [own ; pool ; 0] (L, Rp, width) of every layer in ``dtype``, scaled by D (L, R, 1)."""
    layers, ranks, width = own.shape
    rank = ranks + (0 if pool is None else len(pool))
    rows = own.new_empty((layers, -(-rank // multiple) * multiple, width), dtype=dtype)
    rows[:, rank:] = 0
    mine, shared = rows[:, :ranks], rows[:, ranks:rank]
    if D is None:
        mine.copy_(own)
        if pool is not None:
            shared.copy_(pool)
        return rows
    torch.mul(own, D[:, :ranks], out=mine)
    if pool is not None:
        torch.mul(pool, D[:, ranks:], out=shared)
    return rows


def unpack_group(
    dAp: Sequence[Tensor],
    dBp: Sequence[Tensor],
    B: Sequence[Tensor],
    B_pool: Tensor | None,
    d: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``pack_group``'s parameters, in B's dtype.

    dA (L, r-k, in) is rows of dAp; dB (L, out, r-k) is diag(d) dBp; dd (L, R) is <B[:, j], dBp[j]>
    for every rank j. dA_pool (L*k, in) and dB_pool (out, L*k) are summed over the layers, in a
    fixed order. All results are contiguous.

    dAp holds a matrix (Rp, in) for each layer, and dBp (Rp, out), in the accumulation dtype. Each
    list may be empty; the results that come from it then have no elements. So has dd if d is empty.
    With grad, autograd can differentiate the results.
    """
    own, pooled, dtype = B[0].shape[1], 0 if B_pool is None else B_pool.shape[1], B[0].dtype
    dA, dA_pool, dB, dB_pool, dd = (B[0].new_empty(0) for _ in range(5))
    if dAp:
        down = torch.stack(list(dAp))
        dA = down[:, :own].to(dtype, copy=True)
        dA_pool = down[:, own : own + pooled].sum(0).to(dtype)
    if dBp:
        up = torch.stack(list(dBp))[:, : own + pooled]
        wide = up.dtype
        if d:
            # Row-wise dot products take a fraction of the time of one-row matrix products.
            dots = [torch.linalg.vecdot(up[:, :own], torch.stack(list(B)).mT.to(wide))]
            if B_pool is not None:
                dots.append(torch.linalg.vecdot(up[:, own:], B_pool.t().contiguous().to(wide)))
            dd = torch.cat(dots, 1).to(dtype)
            D = torch.stack(list(d)).unsqueeze(-1)
            up = torch.mul(up, D, out=None if torch.is_grad_enabled() else up)
        dB, dB_pool = (
            grad.mT.to(dtype, copy=True, memory_format=torch.contiguous_format)
            for grad in (up[:, :own], up[:, own:].sum(0))
        )
    return dA, dA_pool, dB, dB_pool, dd


pack_group_backward = operator(
    "pack_group_backward(Tensor[] dAp, Tensor[] dBp, Tensor[] B, Tensor? B_pool, Tensor[] d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)"
)(unpack_group)


def differentiable_pack(
    factors: Factors, dtype: torch.dtype, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Pack one layer, or stacked experts, by operations that autograd differentiates.

    The pack is in the accumulation dtype of ``dtype``.
    """
    A, A_pool, B, B_pool, d = factors
    wide = accumulation_dtype(dtype)
    experts = A.shape[:-2]  # which may share the pool
    downs = [A] if A_pool is None else [A, A_pool.expand(*experts, -1, -1)]
    ups = [B.mT] if B_pool is None else [B.mT, B_pool.mT.expand(*experts, -1, -1)]
    Ap, Bp = (torch.cat([part.to(wide) for part in parts], -2) for parts in (downs, ups))
    if d is not None:
        Bp = Bp * d.to(wide).unsqueeze(-1)
    if fill := -Ap.shape[-2] % multiple:
        Ap, Bp = (torch.nn.functional.pad(matrix, (0, 0, 0, fill)) for matrix in (Ap, Bp))
    return Ap, Bp
