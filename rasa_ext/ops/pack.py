"""Packs: an adapter's parameters as the two matrices that a low-rank linear reads.

Symbols: ``in``/``out`` features, R = r - k + L*k the effective rank, Rp = R rounded up to
``multiple`` (the rows beyond R are zero).

Every rank is a row: A (r-k, in) and A_pool (L*k, in) lie so, and B (out, r-k) and B_pool
(out, L*k) are best stored by ranks, as the transposed view of an (r-k, out) tensor. Other strides
are correct and slower. A_pool and B_pool are both None, or neither is; d = None stands for ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_ext.ops.library import operator


class Factors(NamedTuple):
    """A layer's adapter: dW = [B | B_pool] diag(d) [A ; A_pool]; d = None stands for ones."""

    A: Tensor
    A_pool: Tensor | None
    B: Tensor
    B_pool: Tensor | None
    d: Tensor | None

    @property
    def rank(self) -> int:
        """R, the effective rank."""
        return self.A.shape[0] + (0 if self.A_pool is None else self.A_pool.shape[0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Put every tensor through ``function``."""
        A, A_pool, B, B_pool, d = self
        return Factors(
            function(A),
            None if A_pool is None else function(A_pool),
            function(B),
            None if B_pool is None else function(B_pool),
            None if d is None else function(d),
        )


class Pack(NamedTuple):
    """All that a low-rank linear knows of an adapter: dW = Bp^T Ap."""

    Ap: Tensor
    """(Rp, in)"""
    Bp: Tensor
    """(Rp, out)"""


def padded(rank: int, multiple: int) -> int:
    """Round ``rank`` up to a multiple of ``multiple``."""
    return -(-rank // multiple) * multiple


@operator(
    "pack(Tensor A, Tensor? A_pool, Tensor B, Tensor? B_pool, Tensor? d, ScalarType dtype, "
    "int multiple=1) -> (Tensor Ap, Tensor Bp)"
)
def pack(
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor | None,
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ap = [A ; A_pool] (Rp, in), Bp = diag(d) [B | B_pool]^T (Rp, out), both in ``dtype``."""
    rank = A.shape[0] + (0 if A_pool is None else A_pool.shape[0])
    fill = -rank % multiple
    if A.dtype != dtype or B.dtype != dtype:
        Ap = A.new_empty((rank + fill, A.shape[1]), dtype=dtype)
        Bp = B.new_empty((rank + fill, B.shape[0]), dtype=dtype)
        pack_into(Ap, Bp, A, A_pool, B, B_pool, d)
        return Ap, Bp
    # With nothing to cast, joining takes half as many operations, which is what counts with few
    # tokens.
    Ap = _joined(A, A_pool, fill)
    if not B.shape[0]:
        return Ap, B.new_empty((rank + fill, 0))
    Bp = _joined(B.t(), None if B_pool is None else B_pool.t(), fill)
    if d is not None:
        (Bp.narrow(0, 0, rank) if fill else Bp).mul_(d.unsqueeze(1))
    return Ap, Bp


def _joined(own: Tensor, pool: Tensor | None, fill: int) -> Tensor:
    """[own ; pool ; 0] with ``fill`` rows of zeros."""
    rows = [own] if pool is None else [own, pool]
    if fill:
        rows.append(own.new_zeros((fill, own.shape[1])))
    return torch.cat(rows)


def pack_into(
    Ap: Tensor,
    Bp: Tensor,
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor | None,
) -> None:
    """Write a pack into Ap (Rp, in) and Bp (Rp, out); d B is rounded once, to Bp's dtype."""
    own, pooled = A.shape[0], 0 if A_pool is None else A_pool.shape[0]
    sizes = (own, pooled, Ap.shape[0] - own - pooled)
    down, down_pool, down_fill = Ap.split_with_sizes(sizes)
    up, up_pool, up_fill = Bp.split_with_sizes(sizes)
    down.copy_(A)
    if A_pool is not None:
        down_pool.copy_(A_pool)
    if d is None:
        up.copy_(B.t())
        if B_pool is not None:
            up_pool.copy_(B_pool.t())
    else:
        # In the wider of the two dtypes, so that the product is rounded once.
        scales = d.to(torch.promote_types(d.dtype, Bp.dtype)).unsqueeze(1)
        scale, scale_pool = scales.split_with_sizes(sizes[:2])
        torch.mul(B.t(), scale, out=up)
        if B_pool is not None:
            torch.mul(B_pool.t(), scale_pool, out=up_pool)
    if sizes[2]:
        down_fill.zero_()
        up_fill.zero_()


def _pack_backward_owned(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do the same with memory of its own for every result."""
    dA, dA_pool, dB, dB_pool, dd = _pack_backward(dAp, dBp, B, B_pool, d)
    return dA, dA_pool.clone(), dB, dB_pool.t().clone().t(), dd


@operator(
    "pack_backward(Tensor? dAp, Tensor? dBp, Tensor B, Tensor? B_pool, Tensor? d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)",
    kernel=_pack_backward_owned,
)
def pack_backward(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``pack``'s parameters, in B's dtype, from those of its results.

    dA (r-k, in) and dA_pool (L*k, in) are rows of dAp (Rp, in); dB (out, r-k) and dB_pool
    (out, L*k), stored by ranks, are diag(d) dBp, with dBp (Rp, out); dd_j = <B[:, j], dBp[j]>.
    Results have no elements where dAp or dBp, from which they come, is None, dd also where d is.

    The pool's gradients may be views of dAp and dBp, which the caller gives up. The private ones
    are copies, so that a small gradient does not keep a large one alive.
    """
    return _pack_backward(dAp, dBp, B, B_pool, d)


def _pack_backward(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own, pooled, dtype = B.shape[1], 0 if B_pool is None else B_pool.shape[1], B.dtype
    dA = dA_pool = dB = dB_pool = dd = None
    if dAp is not None:
        dA, dA_pool, _ = dAp.split_with_sizes((own, pooled, dAp.shape[0] - own - pooled))
        dA, dA_pool = dA.to(dtype, copy=True), dA_pool.to(dtype)
    if dBp is not None:
        up, up_pool, _ = dBp.split_with_sizes((own, pooled, dBp.shape[0] - own - pooled))
        if d is None:
            dB, dB_pool = up.to(dtype, copy=True), up_pool.to(dtype)
        else:
            scale, scale_pool = d.unsqueeze(1).split_with_sizes((own, pooled))
            # Row dots: a fraction of the time of a product of matrices of one row each.
            dd = torch.linalg.vecdot(up, B.t().to(dBp.dtype))
            dB = (up * scale).to(dtype)
            if B_pool is not None:
                dd_pool = torch.linalg.vecdot(up_pool, B_pool.t().to(dBp.dtype))
                dd, up_pool = torch.cat((dd, dd_pool)), up_pool * scale_pool
            dd, dB_pool = dd.to(dtype), up_pool.to(dtype)
    return (
        B.new_empty(0) if dA is None else dA,
        B.new_empty(0) if dA_pool is None else dA_pool,
        B.new_empty(0) if dB is None else dB.t(),
        B.new_empty(0) if dB_pool is None else dB_pool.t(),
        B.new_empty(0) if dd is None else dd,
    )
