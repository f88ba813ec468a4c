"""Packs: an adapter's parameters as the two matrices that a low-rank linear reads.

Symbols: ``in``/``out`` features, R = r - k + L*k the effective rank, Rp = R rounded up to
``multiple`` (the rows beyond R are zero).

Every rank is a row. A (r-k, in) and A_pool (L*k, in) already have this layout; B (out, r-k) and
B_pool (out, L*k) are best stored by ranks, as the transposed view of an (r-k, out) tensor. Other
strides are correct but slower. A_pool and B_pool are both None or both given; d = None means ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rasa_ext.ops.library import operator


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

    def with_pool_of_each(self) -> Factors:
        """Return factors in which every expert has a view of the shared pool, if there is one."""
        A, A_pool, B, B_pool, d = self
        if A_pool is not None and B_pool is not None and A_pool.dim() == 2:
            A_pool, B_pool = (pool.expand(A.shape[0], -1, -1) for pool in (A_pool, B_pool))
        return Factors(A, A_pool, B, B_pool, d)

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Apply ``function`` to every tensor."""
        A, A_pool, B, B_pool, d = self
        return Factors(
            function(A),
            None if A_pool is None else function(A_pool),
            function(B),
            None if B_pool is None else function(B_pool),
            None if d is None else function(d),
        )


class Pack(NamedTuple):
    """An adapter as a low-rank linear reads it: dW = Bp^T Ap."""

    Ap: Tensor
    """(Rp, in)"""
    Bp: Tensor
    """(Rp, out)"""


Gradients: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor]"
"""Gradients of A, A_pool, B, B_pool and d."""
FactorGrads: TypeAlias = (
    "tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]"
)


def packed(
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor | None,
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return Ap = [A ; A_pool] (Rp, in) and Bp = diag(d) [B | B_pool]^T (Rp, out) in ``dtype``."""
    # Join first, then cast: with few tokens, the time depends on the number of operations and of
    # Python calls.
    Ap = torch.cat(rows_of(A, A_pool, multiple))
    return Ap if Ap.dtype == dtype else Ap.to(dtype), packed_up(B, B_pool, d, dtype, multiple)


def packed_up(
    B: Tensor, B_pool: Tensor | None, d: Tensor | None, dtype: torch.dtype, multiple: int
) -> Tensor:
    """Pack B, B_pool and d to Bp (Rp, out); d B is rounded once, to ``dtype``."""
    Bp = torch.cat(rows_of(B.t(), None if B_pool is None else B_pool.t(), multiple))
    if d is not None:
        if not Bp.dtype == d.dtype == dtype:
            Bp = Bp.to(torch.promote_types(torch.promote_types(Bp.dtype, d.dtype), dtype))
        (Bp if multiple == 1 else Bp.narrow(0, 0, d.shape[0])).mul_(d.unsqueeze(1))
    return Bp if Bp.dtype == dtype else Bp.to(dtype)


def rows_of(own: Tensor, pool: Tensor | None, multiple: int) -> list[Tensor]:
    """Return the parts to stack in a pack: own, pool and rows of zeros."""
    rows = [own] if pool is None else [own, pool]
    if multiple != 1 and (fill := -sum(map(len, rows)) % multiple):
        rows.append(own.new_zeros((fill, own.shape[1])))
    return rows


pack = operator(
    "pack(Tensor A, Tensor? A_pool, Tensor B, Tensor? B_pool, Tensor? d, ScalarType dtype, "
    "int multiple=1) -> (Tensor Ap, Tensor Bp)"
)(packed)


def _registered(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> Gradients:
    own = None if dBp is None else dBp.clone()
    return with_own_memory(*as_results(B, factor_grads(dAp, own, B, B_pool, d)))


@operator(
    "pack_backward(Tensor? dAp, Tensor? dBp, Tensor B, Tensor? B_pool, Tensor? d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)",
    kernel=_registered,
)
def pack_backward(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> Gradients:
    """Return the gradients of ``pack``'s parameters, in B's dtype.

    dA (r-k, in) and dA_pool (L*k, in) are rows of dAp (Rp, in); dB (out, r-k) and dB_pool
    (out, L*k), stored by ranks, are diag(d) dBp, with dBp (Rp, out); dd_j = <B[:, j], dBp[j]>.
    A result has no elements if the dAp or dBp that it comes from is None; dd also if d is None.

    The caller must not use dAp and dBp again: dBp may be overwritten, and the pool's gradients may
    be views. The private gradients are copies, so that they do not keep a large tensor alive.
    """
    return as_results(B, factor_grads(dAp, dBp, B, B_pool, d))


def factor_grads(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> FactorGrads:
    """Compute ``pack_backward``, with None for results not needed; dBp is overwritten."""
    own, pooled, dtype = B.shape[1], 0 if B_pool is None else B_pool.shape[1], B.dtype
    dA = dA_pool = dB = dB_pool = dd = None
    if dAp is not None:
        dA, dA_pool = dAp.narrow(0, 0, own).clone(), dAp.narrow(0, own, pooled)
        if dAp.dtype != dtype:
            dA, dA_pool = dA.to(dtype), dA_pool.to(dtype)
    if dBp is not None:
        up, up_pool = dBp.narrow(0, 0, own), dBp.narrow(0, own, pooled)
        if d is not None:
            # Row-wise dot products take a fraction of the time of one-row matrix products.
            dd = torch.linalg.vecdot(up, B.t().to(dBp.dtype))
            if B_pool is not None:
                dots = torch.linalg.vecdot(up_pool, B_pool.t().to(dBp.dtype))
                dd = torch.cat((dd, dots))
            dBp.narrow(0, 0, own + pooled).mul_(d.unsqueeze(1))
        dB, dB_pool = up.clone().t(), up_pool.t()
        if dBp.dtype != dtype:
            dB, dB_pool = dB.to(dtype), dB_pool.to(dtype)
            dd = None if dd is None else dd.to(dtype)
    return dA, dA_pool, dB, dB_pool, dd


def as_results(like: Tensor, grads: FactorGrads) -> Gradients:
    """Replace None, which an operator cannot return, by a tensor without elements."""
    a, b, c, d, e = [like.new_empty(0) if grad is None else grad for grad in grads]
    return a, b, c, d, e


def with_own_memory(
    dA: Tensor, dA_pool: Tensor, dB: Tensor, dB_pool: Tensor, dd: Tensor
) -> Gradients:
    """Copy the pool's gradients, since an operator must not return views."""
    if dB_pool.dim() == 2:
        dB_pool = dB_pool.t().clone().t()
    return dA, dA_pool.clone(), dB, dB_pool, dd
