"""Leading singular components of matrices, computed from products without forming the matrix."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rasa_ext.linalg import Components

EXACT = 128
"""A matrix with a smaller side up to this gets a dense SVD, which is fastest there."""

_OVERSAMPLING = 8
_ROUNDS = 100
_GAIN = 1e-12
"""Stop when a round adds at most this share of the subspace's squared norm."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """``left @ right``, (out, in), minus the product of the pair ``subtracted``, if there is one.

    left (out, s) and right (s, in), or only left (out, in); subtracted (out, K) and (K, in).
    """

    left: Tensor
    right: Tensor | None = None
    subtracted: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def minus(self, left: Tensor, right: Tensor) -> Matrix:
        """Return this matrix with ``left @ right`` as the product to subtract."""
        return dataclasses.replace(self, subtracted=(left, right))

    def times(self, x: Tensor) -> Tensor:
        """Return the product with x (in, n): (out, n)."""
        y = self.left @ (x if self.right is None else self.right @ x)
        if self.subtracted is None:
            return y
        left, right = self.subtracted
        return y - left @ (right @ x)

    def transposed_times(self, x: Tensor) -> Tensor:
        """Return the product of the transpose with x (out, n): (in, n)."""
        y = self.left.t() @ x
        y = y if self.right is None else self.right.t() @ y
        if self.subtracted is None:
            return y
        left, right = self.subtracted
        return y - right.t() @ (left.t() @ x)

    def squared_norm(self) -> float:
        """Return ||left right||^2, without ``subtracted``."""
        if self.right is None:
            return self.left.double().square().sum().item()
        left, right = self.left.double(), self.right.double()
        return ((left.t() @ left) * (right @ right.t())).sum().item()

    def dense(self) -> Tensor:
        """Return the matrix as one tensor (out, in)."""
        y = self.left if self.right is None else self.left @ self.right
        if self.subtracted is None:
            return y
        left, right = self.subtracted
        return y - left @ right


def truncated_svd(
    matrix: Matrix, rank: int, generator: torch.Generator, start: Tensor | None = None
) -> Components:
    """Return the ``rank`` leading singular components, or fewer if the smaller side is below it.

    Small matrices get a dense SVD. For others, a block Krylov iteration over the matrix and the
    transpose (Musco and Musco, arXiv 1504.05477) runs until another round no longer helps. It
    starts from the row space ``start`` (n, in), n <= rank, and the result never captures less of
    the matrix than ``start``. Without ``start``, it is a randomized SVD.
    """
    if min(matrix.shape) <= EXACT:
        U, S, V = torch.linalg.svd(matrix.dense(), full_matrices=False)
        return Components(U[:, :rank], S[:rank], V[:rank])
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    given = matrix.left.new_zeros(matrix.shape[1], 0) if start is None else start.t()
    fresh = _random((matrix.shape[1], width - given.shape[1]), given, generator)
    basis = torch.linalg.qr(torch.cat([given, fresh], 1)).Q
    held = 0.0
    for _ in range(_ROUNDS):
        Y = matrix.times(basis)
        held = max(held, Y[:, :rank].square().sum().item())
        Z = torch.linalg.qr(matrix.transposed_times(torch.linalg.qr(Y).Q)).Q
        Q = torch.linalg.qr(torch.cat([Y, matrix.times(Z)], 1)).Q
        W, S, V = torch.linalg.svd(matrix.transposed_times(Q).t(), full_matrices=False)
        now = S[:rank].square().sum().item()
        basis = V[:width].t()
        if now - held <= _GAIN * now:
            break
        held = now
    return Components(Q @ W[:, :rank], S[:rank], V[:rank])


def complete_basis(found: Components, rank: int, generator: torch.Generator) -> Components:
    """Add random unit vectors with singular value 0 until there are ``rank`` components."""
    U, S, V = found
    missing = rank - S.shape[0]
    if missing <= 0:
        return found
    more_U = normalize(_random((U.shape[0], missing), U, generator), dim=0)
    more_V = normalize(_random((missing, V.shape[1]), V, generator), dim=1)
    return Components(
        torch.cat([U, more_U], 1), torch.cat([S, S.new_zeros(missing)]), torch.cat([V, more_V])
    )


def solve_normal(N: Tensor, rhs: Tensor) -> Tensor:
    """Return a least-squares X of N X = rhs, with N (n, n) symmetric and positive semi-definite.

    N is first scaled to a unit diagonal, so unequal scales do not count as singular. Eigenvalues up
    to n * eps of the largest then count as zero, and X has no part in their directions.
    """
    if not N.numel():
        return rhs.clone()
    scale = N.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale.reciprocal(), 0)
    values, vectors = torch.linalg.eigh(N * scale[:, None] * scale)
    kept = values > N.shape[0] * torch.finfo(N.dtype).eps * values.max()
    inverse = torch.where(kept, values.reciprocal(), 0)
    scaled: Tensor = vectors @ (inverse[:, None] * (vectors.t() @ (scale[:, None] * rhs)))
    return scale[:, None] * scaled


def _random(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from N(0, 1) on the CPU, so that values are equal for every device."""
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
