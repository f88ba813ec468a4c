"""A shared basis for several adapters' changes of one layer: B diag(d_i) A approximates dW_i.

This is JD-Diag of "Compress then Serve" (arXiv 2407.00066). It is also RaSA's formula with every
rank in the pool (arXiv 2503.12576, section 3) and adapters in place of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from rasa_ext.linalg import Components, svd_of_product
from rasa_research.solver.coordinate_descent import CoordinateDescent
from rasa_research.solver.low_rank import Matrix, complete_basis

_TRIED = 20
"""Rounds from each start, before only the best start continues."""


class SharedBasis(NamedTuple):
    """One layer with n adapters: adapter i changes the weight by B diag(d[i]) A.

    Example:
        >>> from rasa_research import solver
        >>> basis = solver.SharedBasis(torch.randn(16, 4), torch.randn(4, 12), torch.ones(2, 4))
        >>> torch.equal(basis.delta(1), basis.B @ basis.A)
        True
    """

    B: Tensor
    """(out, R), with columns of length one, or zero if R is larger than needed."""
    A: Tensor
    """(R, in), with rows of length one, or zero."""
    d: Tensor
    """(n, R)."""

    def delta(self, i: int) -> Tensor:
        """Return adapter i's weight change, (out, in)."""
        return (self.B * self.d[i]) @ self.A


def find_shared_basis(
    changes: Sequence[tuple[Tensor, Tensor]], rank: int, *, iterations: int, tol: float
) -> SharedBasis:
    """Minimize sum_i ||B_i A_i - B diag(d_i) A||^2 by coordinate descent, from three starts.

    apart     the ``rank`` largest singular components among all changes, each used by only one
              adapter: the best separate LoRAs. No step raises the error from there.
    together  the leading components of the sum of changes, which all adapters may use.
    solved    the exact basis, if the changes share one of that rank: eigenvectors of one mixture of
              them times the inverse of another (Jennrich's algorithm for tensors).

    After some rounds, only the best start continues, so the error is never above that of "apart".

    ``changes`` are the factors (B_i, A_i), (out, r_i) and (r_i, in), of one dtype and device; no
    (out, in) matrix is formed. A descent ends when a round lowers the relative squared error by at
    most ``tol``.
    """
    ranks = [A.shape[0] for _, A in changes]
    # The best B and A are in the spans of all B_i and A_i. Projected there, the problem is small.
    to_out, left = torch.linalg.qr(torch.cat([B for B, _ in changes], 1))
    to_in, right = torch.linalg.qr(torch.cat([A for _, A in changes]).t())
    pieces = zip(left.split(ranks, 1), right.split(ranks, 1), strict=True)
    targets = [Matrix(B, A.t()) for B, A in pieces]
    pooled = min(rank, sum(ranks))
    total = sum(target.squared_norm() for target in targets)
    n, missing = len(changes), rank - pooled
    if not pooled or not total:
        B, A = changes[0]
        return SharedBasis(
            B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1]), B.new_zeros(n, rank)
        )
    least, tried = tol * total, min(iterations, _TRIED)
    descents = []
    for start in (_apart, _together, _solved):
        descent = CoordinateDescent(targets, 0, pooled)
        start(descent)
        descents.append((_descend(descent, tried, least), descent))
    _, best = min(descents, key=lambda pair: pair[0])
    _descend(best, iterations - tried, least)
    best.normalize_pool()
    return SharedBasis(
        pad(to_out @ best.pool_B, (0, missing)),
        pad(best.pool_A @ to_in.t(), (0, 0, 0, missing)),
        pad(best.d, (0, missing)),
    )


def largest(values: Sequence[Tensor], count: int) -> list[tuple[int, int]]:
    """Return places of the ``count`` largest entries: (index of the tensor, index in it)."""
    places = [(i, j) for i, each in enumerate(values) for j in range(each.numel())]
    order = torch.cat(list(values)).argsort(descending=True, stable=True)
    return [places[place] for place in order[:count].tolist()]


def _descend(descent: CoordinateDescent, iterations: int, least: float) -> float:
    error = descent.error()
    for _ in range(iterations):
        before = error
        descent.update()
        error = descent.error()
        if before - error <= least:
            break
    return error


def _apart(descent: CoordinateDescent) -> None:
    found = [svd_of_product(B, A) for B, A in _pairs(descent)]
    chosen = largest([each.S for each in found], descent.d.shape[1])
    for slot, (i, j) in enumerate(chosen):
        U, S, V = found[i]
        descent.pool_B[:, slot], descent.pool_A[slot], descent.d[i, slot] = U[:, j], V[j], S[j]


def _together(descent: CoordinateDescent) -> None:
    lefts, rights = zip(*_pairs(descent), strict=True)
    _begin(descent, svd_of_product(torch.cat(lefts, 1), torch.cat(rights)))


def _solved(descent: CoordinateDescent) -> None:
    """Start from the eigenvectors of X Y^-1, with random mixtures X and Y of all M_i.

    If M_i = U D_i V for all i, they are the columns of U. Otherwise a complex pair may occur; its
    real and imaginary parts are used.
    """
    pairs, slots = _pairs(descent), descent.d.shape[1]
    # Orthonormal parts of the other factor do not change the span, so only R factors are needed.
    outs = torch.cat([B @ torch.linalg.qr(A.t()).R.t() for B, A in pairs], 1)
    ins = torch.cat([torch.linalg.qr(B).R @ A for B, A in pairs])
    P = torch.linalg.svd(outs, full_matrices=False).U[:, :slots]
    Q = torch.linalg.svd(ins, full_matrices=False).Vh[:slots]
    rank = min(P.shape[1], Q.shape[0])
    P, Q = P[:, :rank], Q[:rank]
    small = torch.stack([(P.t() @ B) @ (A @ Q.t()) for B, A in pairs])
    weights = torch.randn(2, len(small), generator=torch.Generator().manual_seed(0))
    X, Y = torch.einsum("mi,ipq->mpq", weights.to(small), small)
    values, vectors = torch.linalg.eig(X @ torch.linalg.pinv(Y))
    U = normalize(torch.where(values.imag >= 0, vectors.real, vectors.imag), dim=0)
    V = torch.linalg.pinv(U) @ Y
    length = V.norm(dim=1)
    _begin(descent, Components(P @ U, length, normalize(V, dim=1) @ Q))


def _begin(descent: CoordinateDescent, found: Components) -> None:
    """Start from the basis of ``found``, completed at random, with the best diagonals."""
    slots = descent.d.shape[1]
    found = complete_basis(found, slots, torch.Generator().manual_seed(0))
    descent.pool_B, descent.pool_A = found.U[:, :slots], found.V[:slots]
    descent.update_d()


def _pairs(descent: CoordinateDescent) -> list[tuple[Tensor, Tensor]]:
    """Return the targets' factors; here all targets are products."""
    return [(t.left, t.right) for t in descent.targets if t.right is not None]
