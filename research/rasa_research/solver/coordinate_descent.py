"""Coordinate descent on sum_i ||M_i - B_i A_i - B_S D_i A_S||^2 (arXiv 2503.12576, appendix A).

Each of the four half-steps is the closed-form minimum over one block, with the others fixed:

    B_i A_i  best rank r-k of M_i - B_S D_i A_S
    B_S      [sum_i R_i A_S^T D_i] [sum_i D_i A_S A_S^T D_i]^-1           R_i = M_i - B_i A_i
    A_S      [sum_i D_i B_S^T B_S D_i]^-1 [sum_i D_i B_S^T R_i]
    d_i      (B_S^T B_S o A_S A_S^T)^-1 g,   g_j = b_j^T R_i a_j           o: elementwise

The last three add the solution for the residual to the current value. If the normal equations are
singular, the part in the null space does not change. So no half-step can raise the error, and the
diagonals can later use a slot that no layer uses now.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rasa_ext.linalg import Components
from rasa_research.solver.low_rank import Matrix, complete_basis, solve_normal, truncated_svd


class CoordinateDescent:
    """The factors of L layers of shape (out, in), and the four half-steps.

    A (p, in) and B (out, p) are lists with one entry per layer, p = r-k; d is (L, K), pool_A
    (K, in), pool_B (out, K) with K = L*k.
    """

    def __init__(self, targets: list[Matrix], own: int, pooled: int) -> None:
        """Set all factors to zero; ``own`` is p, ``pooled`` is K."""
        out, width = targets[0].shape
        new = targets[0].left.new_zeros
        self.targets = targets
        self.A = [new(own, width) for _ in targets]
        self.B = [new(out, own) for _ in targets]
        self.d = new(len(targets), pooled)
        self.pool_A = new(pooled, width)
        self.pool_B = new(out, pooled)
        self._generator = torch.Generator().manual_seed(0)
        self.norms = [target.squared_norm() for target in targets]

    def start_from_theorem(self, found: list[Components], k: int) -> None:
        """Make components 1..r-k of every target private; put r-k+1..r into the layer's slots.

        ``found`` has the leading r components of each target. The error is then LoRA's minimum.
        """
        own = self.A[0].shape[0]
        for i, components in enumerate(found):
            U, S, V = complete_basis(components, own + k, self._generator)
            self._split(i, Components(U[:, :own], S[:own], V[:own]))
            slots = slice(i * k, (i + 1) * k)
            self.pool_B[:, slots] = U[:, own : own + k]
            self.pool_A[slots] = V[own : own + k]
            self.d[i, slots] = S[own : own + k]

    def start_at_random(self) -> None:
        """Draw a random pool and diagonals, scaled to each target's norm; private ranks stay zero.

        The values are drawn from torch's global generator.
        """
        (K, width), out = self.pool_A.shape, self.pool_B.shape[0]
        self.pool_A = torch.randn_like(self.pool_A) / width**0.5
        self.pool_B = torch.randn_like(self.pool_B) / out**0.5
        scales = self.d.new_tensor(self.norms).sqrt() / max(K, 1) ** 0.5
        self.d = torch.randn_like(self.d) * scales[:, None]

    def update_private(self) -> None:
        """Update B_i A_i of every layer; each factor gets the square roots of singular values."""
        own = self.A[0].shape[0]
        if not own:
            return
        for i, target in enumerate(self.targets):
            rest = target.minus(self.pool_B * self.d[i], self.pool_A)
            found = truncated_svd(rest, own, self._generator, start=self.A[i])
            self._split(i, complete_basis(found, own, self._generator))

    def update_pool_B(self) -> None:
        """Update B_S, for all layers together."""
        N = (self.pool_A @ self.pool_A.t()) * (self.d.t() @ self.d)
        found = sum(self._residual_times_pool(i) * self.d[i] for i in range(len(self.targets)))
        self.pool_B = self.pool_B + solve_normal(N, (found - self.pool_B @ N).t()).t()

    def update_pool_A(self) -> None:
        """Update A_S, for all layers together."""
        N = (self.pool_B.t() @ self.pool_B) * (self.d.t() @ self.d)
        found = torch.zeros_like(self.pool_A)
        for i, target in enumerate(self.targets):
            residual = target.minus(self.B[i], self.A[i])
            found += self.d[i][:, None] * residual.transposed_times(self.pool_B).t()
        self.pool_A = self.pool_A + solve_normal(N, found - N @ self.pool_A)

    def update_d(self) -> None:
        """Update d_i of every layer, with one factorization for all."""
        H = (self.pool_B.t() @ self.pool_B) * (self.pool_A @ self.pool_A.t())
        layers = range(len(self.targets))
        g = torch.stack([(self._residual_times_pool(i) * self.pool_B).sum(0) for i in layers])
        self.d = self.d + solve_normal(H, (g - self.d @ H).t()).t()

    def update(self) -> None:
        """Run all four half-steps."""
        self.update_private()
        if self.d.numel():
            self.update_pool_B()
            self.update_pool_A()
            self.update_d()

    def error(self) -> float:
        """Return sum_i ||M_i - B_i A_i - B_S D_i A_S||^2, from products of factors."""
        total = 0.0
        for i, target in enumerate(self.targets):
            Bt = torch.cat([self.B[i], self.pool_B * self.d[i]], 1)
            Ap = torch.cat([self.A[i], self.pool_A])
            with_target = (target.times(Ap.t()) * Bt).sum()
            with_itself = ((Bt.t() @ Bt) * (Ap @ Ap.t())).sum()
            total += max(self.norms[i] - (2 * with_target - with_itself).item(), 0.0)
        return total

    def normalize_pool(self) -> None:
        """Normalize rows of A_S and columns of B_S; multiply the diagonals by their lengths."""
        for lengths in (self.pool_A.norm(dim=1), self.pool_B.norm(dim=0)):
            self.d = self.d * lengths
        tiny = torch.finfo(self.d.dtype).tiny
        self.pool_A = normalize(self.pool_A, dim=1, eps=tiny)
        self.pool_B = normalize(self.pool_B, dim=0, eps=tiny)

    def _residual_times_pool(self, i: int) -> Tensor:
        """Return R_i A_S^T, (out, K)."""
        return self.targets[i].minus(self.B[i], self.A[i]).times(self.pool_A.t())

    def _split(self, i: int, components: Components) -> None:
        U, S, V = components
        root = S.sqrt()
        self.B[i], self.A[i] = U * root, root[:, None] * V
