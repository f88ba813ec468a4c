"""LoRA-Pro's least-squares problem and the least-norm solution, for pairs and for pools.

A rank a of a group belongs either to one layer or to the pool: dW_i = sum_a C_ia up_a down_a^T,
with the diagonals in C. To first order, a step z of down and up changes the weights by J z,

    (J z)_i = sum_a C_ia (z_up_a down_a^T + up_a z_down_a^T).

LoRA-Pro (arXiv 2407.18242) minimizes the distance of J z to the gradient g of the weights. Among
all minimizers, the paper's matrix X selects the z nearest to autograd's gradient, G = J^T g. G is
in the range of J^T, which is orthogonal to the null space of J. So the z nearest to G is also the
smallest one, z = J^+ g. It solves J^T J z = G, so g itself is never needed. With P = C^T C,

    (J^T J z)_down = (up up^T o P) z_down + (up z_up^T o P) down

and likewise with down and up exchanged. For pairs of factors there is a closed-form solution. For
layers that share a pool, conjugate gradients solve the equation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Blocks(NamedTuple):
    """The entries of a matrix (ranks, ranks) for pairs of ranks that some layer uses together."""

    own: Tensor
    """(L, r, r): private ranks of one layer with each other."""
    right: Tensor
    """(L*r + K, K): all ranks with the pool."""
    left: Tensor
    """(K, L*r): the pool with private ranks."""


class Ranks:
    """All ranks of a group of L layers as rows: first r of each layer, then K of the pool.

    A step or gradient is one flat tensor: first the part for ``down``, then the part for ``up``.

    Args:
        down: the rows of A and A_pool, (L*r + K, in).
        up: the columns of B and B_pool, as rows, (L*r + K, out).
        own: the diagonals of private ranks, (L, r).
        pool: the diagonals of the pool, (L, K); K = 0 if the layers are single pairs.
    """

    def __init__(self, down: Tensor, up: Tensor, own: Tensor, pool: Tensor) -> None:
        self.down, self.up, self.own, self.pool = down, up, own, pool
        self.layers, self.rank = own.shape
        self.count = own.numel()
        """L*r, the first row of the pool."""
        shared = (own.unsqueeze(2) * pool.unsqueeze(1)).flatten(0, 1)
        self._weights = _Blocks(
            own.unsqueeze(2) * own.unsqueeze(1), torch.cat((shared, pool.t() @ pool)), shared.t()
        )

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """View a flat step or gradient as two tensors with the shapes of ``down`` and ``up``."""
        down, up = flat.split((self.down.numel(), self.up.numel()))
        return down.view_as(self.down), up.view_as(self.up)

    def by_layer(self, rows: Tensor) -> Tensor:
        """View the private ranks' part of ``rows`` as (L, r, width)."""
        return rows[: self.count].view(self.layers, self.rank, rows.shape[1])

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return the diagonal of J^T J per rank, (ranks,), for rows of ``down`` and of ``up``."""
        weight = torch.cat((self.own.square().flatten(), self.pool.square().sum(0)))
        return weight * self.up.square().sum(1), weight * self.down.square().sum(1)

    def grams(self) -> tuple[_Blocks, _Blocks]:
        """Return the step-independent parts of J^T J: up up^T o P and down down^T o P."""
        return self._products(self.up, self.up), self._products(self.down, self.down)

    def normal(self, step: Tensor, grams: tuple[_Blocks, _Blocks]) -> Tensor:
        """Compute J^T J z of a flat ``step`` z, with the result of ``grams``."""
        result = torch.zeros_like(step)
        (down, up), (to_down, to_up) = self.split(step), self.split(result)
        self._add_product(to_down, grams[0], down)
        self._add_product(to_down, self._products(self.up, up), self.down)
        self._add_product(to_up, grams[1], up)
        self._add_product(to_up, self._products(self.down, down), self.up)
        return result

    def change(self, layer: int, step: Tensor) -> Tensor:
        """Compute (J z)_i (out, in), the change of a layer's weight by a flat ``step`` z."""
        down, up = self.split(step)
        weight = self._weight(layer)
        left = torch.cat((self._of(layer, up), self._of(layer, self.up))) * torch.cat((weight,) * 2)
        return left.t() @ torch.cat((self._of(layer, self.down), self._of(layer, down)))

    def add_gradient(self, layer: int, dense: Tensor, total: Tensor) -> None:
        """Add J^T of ``dense`` (out, in), a change of one layer's weight, to the flat ``total``."""
        weight, down, up = self._weight(layer), *self.split(total)
        for to, rows in (
            (down, (weight * self._of(layer, self.up)) @ dense),
            (up, (weight * self._of(layer, self.down)) @ dense.t()),
        ):
            to[layer * self.rank : (layer + 1) * self.rank] += rows[: self.rank]
            to[self.count :] += rows[self.rank :]

    def _of(self, layer: int, rows: Tensor) -> Tensor:
        own = rows[layer * self.rank : (layer + 1) * self.rank]
        return torch.cat((own, rows[self.count :]))

    def _weight(self, layer: int) -> Tensor:
        return torch.cat((self.own[layer], self.pool[layer])).unsqueeze(1)

    def _products(self, left: Tensor, right: Tensor) -> _Blocks:
        """Compute left right^T o P."""
        weights, start = self._weights, self.count
        return _Blocks(
            torch.bmm(self.by_layer(left), self.by_layer(right).mT) * weights.own,
            (left @ right[start:].t()) * weights.right,
            (left[start:] @ right[:start].t()) * weights.left,
        )

    def _add_product(self, total: Tensor, blocks: _Blocks, rows: Tensor) -> None:
        start = self.count
        total.addmm_(blocks.right, rows[start:])
        total[start:].addmm_(blocks.left, rows[:start])
        self.by_layer(total).baddbmm_(blocks.own, self.by_layer(rows))


def pair_steps(ranks: Ranks, gradient: Tensor, trained: Tensor, ridge: float) -> Tensor:
    """Solve (J^T J + rho) z = G for layers without a pool, in closed form.

    First multiply down and up by the diagonals. Rotate down and G_up into the eigenbasis of
    down down^T (eigenvalues mu), up and G_down into the eigenbasis of up up^T (eigenvalues lambda).
    There the paper's Sylvester equation is elementwise,
    C_ij = (G_down down^T)_ij / (lambda_i + mu_j + rho), and the rows of z are
    z_down = (G_down - C down) / (lambda + rho) and z_up = (G_up - C^T up) / (mu + rho). If one of
    the factors is not trained, C is zero.

    Args:
        ranks: ranks of L pairs, without a pool.
        gradient: G, flat.
        trained: (2, L*r), for the rows of ``down`` and ``up``: 1 if trained, otherwise 0.
        ridge: rho of a pair, relative to the mean of the diagonal of J^T J over trained rows.

    Returns:
        z, flat; 0 for rows that are not trained.
    """
    weight = ranks.own.unsqueeze(2)
    down, up = (weight * ranks.by_layer(rows) for rows in (ranks.down, ranks.up))
    of_down, of_up = (ranks.by_layer(rows) for rows in ranks.split(gradient))
    in_down, in_up = trained.view(2, ranks.layers, ranks.rank, 1).to(torch.float64)

    # Gram matrices square the condition number. They are only r x r, so float64 costs little.
    (lambdas, u), (mus, v) = (_eigen(rows) for rows in (up, down))
    total = (in_down * lambdas.unsqueeze(2) + in_up * mus.unsqueeze(2)).sum((1, 2))
    rho = ridge * total / (in_down + in_up).sum((1, 2)).clamp(min=1)
    lambdas, mus = lambdas.unsqueeze(2), mus.unsqueeze(1)
    coupling = _inverse(lambdas + mus + rho.view(-1, 1, 1)) * (in_down * in_up)[:, :1]
    by_lambda, by_mu = (_inverse(each + rho.view(-1, 1, 1)) for each in (lambdas, mus.mT))

    u, v = u.to(down.dtype), v.to(down.dtype)
    down, of_up, up, of_down = v.mT @ down, v.mT @ of_up, u.mT @ up, u.mT @ of_down
    cross = (of_down @ down.mT) * coupling.to(down.dtype)
    step_down = u @ ((of_down - cross @ down) * by_lambda.to(down.dtype))
    step_up = v @ ((of_up - cross.mT @ up) * by_mu.to(down.dtype))
    step_down, step_up = step_down * in_down.to(down.dtype), step_up * in_up.to(down.dtype)
    return torch.cat((step_down.flatten(), step_up.flatten()))


def _eigen(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose rows rows^T (L, r, r) in float64; set values of rounding size to zero.

    Ranks with a zero diagonal have such values, for example ranks with a closed gate.
    """
    wide = rows.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    rounding = values[:, -1:] * wide.shape[1] * torch.finfo(wide.dtype).eps
    return torch.where(values > rounding, values, 0), vectors


def _inverse(values: Tensor) -> Tensor:
    """Return 1 / value for positive values, otherwise 0."""
    return torch.where(values > 0, 1 / values, 0)


def pool_steps(
    ranks: Ranks,
    gradient: Tensor,
    trained: Tensor,
    ridge: float,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Solve (J^T J + rho) z = G for any group by conjugate gradients from zero.

    After any number of iterations, z minimises ||J z - g||^2 + rho ||z||^2 over the subspace
    searched so far. So z^T G > 0, and -z is a descent direction. One iteration returns the raw
    gradient, scaled.

    Args:
        ranks: ranks of the group.
        gradient: G, flat; 0 for rows that are not trained.
        trained: (2, ranks), for the rows of ``down`` and ``up``: 1 if trained, otherwise 0.
        ridge: rho, relative to the mean of the diagonal of J^T J over trained rows.
        iterations: the largest number of iterations.
        tolerance: stop when the residual's norm is at most this fraction of the norm of G.

    Returns:
        z, flat.
    """
    step, residual = torch.zeros_like(gradient), gradient.clone()
    direction = residual.clone()
    grams, kept = ranks.grams(), torch.empty_like(gradient)
    for part, which in zip(ranks.split(kept), trained, strict=True):
        part.copy_(which.unsqueeze(1).expand_as(part))
    rho = ridge * (torch.stack(ranks.norms()) * trained).sum() / trained.sum().clamp(min=1)
    square = residual.dot(residual)
    end = tolerance**2 * square
    for _ in range(iterations):
        # On a GPU the host does not wait for the residual: iterations after the end add zero.
        if square.device.type == "cpu" and square <= end:
            break
        image = (ranks.normal(direction, grams) * kept).addcmul_(direction, rho)
        curvature = direction.dot(image)
        going = (square > end) & (curvature > 0)
        length = torch.where(going, square / curvature, 0)
        step.addcmul_(direction, length)
        residual.addcmul_(image, -length)
        before, square = square, residual.dot(residual)
        direction.mul_(torch.where(going, square / before, 0)).add_(residual)
    return step
