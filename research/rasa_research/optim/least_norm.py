"""LoRA-Pro's least-squares problem, and its solution of least norm, for pairs and for pools.

The layers of a group have the ranks a, of which some are one layer's own and others the pool's:
dW_i = sum_a C_ia up_a down_a^T, with the diagonals in C. To first order a step z of down and up
changes the weights by J z,

    (J z)_i = sum_a C_ia (z_up_a down_a^T + up_a z_down_a^T).

LoRA-Pro (arXiv 2407.18242) asks for the z that brings J z nearest to the gradient g of the weights,
and takes of all these, by its matrix X, the one nearest to G = J^T g, which is what autograd gives.
G lies in the range of J^T, which is orthogonal to the null space of J. So the nearest to G is the
nearest to zero, z = J^+ g, and J^T J z = G says all: g itself is never needed. With P = C^T C

    (J^T J z)_down = (up up^T o P) z_down + (up z_up^T o P) down

and the same with down and up exchanged. For one pair of factors this is solved in closed form, for
layers that share a pool by conjugate gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Blocks(NamedTuple):
    """The elements of a matrix (ranks, ranks) where two ranks meet in some layer."""

    own: Tensor
    """(L, r, r): a layer's own with each other."""
    right: Tensor
    """(L*r + K, K): all with the pool."""
    left: Tensor
    """(K, L*r): the pool with the own."""


class Ranks:
    """The ranks of a group of L layers below each other, first r of each layer, then K of the pool.

    A step or gradient of them is one flat tensor: what belongs to ``down``, then to ``up``.

    Args:
        down: the rows of A and A_pool, (L*r + K, in).
        up: the columns of B and B_pool, as rows, (L*r + K, out).
        own: the diagonals of the layers' own ranks, (L, r).
        pool: those of the pool, (L, K); K = 0 where the layers are single pairs.
    """

    def __init__(self, down: Tensor, up: Tensor, own: Tensor, pool: Tensor) -> None:
        self.down, self.up, self.own, self.pool = down, up, own, pool
        self.layers, self.rank = own.shape
        self.count = own.numel()
        """L*r: where the pool begins."""
        shared = (own.unsqueeze(2) * pool.unsqueeze(1)).flatten(0, 1)
        self._weights = _Blocks(
            own.unsqueeze(2) * own.unsqueeze(1), torch.cat((shared, pool.t() @ pool)), shared.t()
        )

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """View a flat step or gradient as its parts, of the shapes of ``down`` and ``up``."""
        down, up = flat.split((self.down.numel(), self.up.numel()))
        return down.view_as(self.down), up.view_as(self.up)

    def by_layer(self, rows: Tensor) -> Tensor:
        """View the layers' own of some rows as (L, r, width)."""
        return rows[: self.count].view(self.layers, self.rank, rows.shape[1])

    def norms(self) -> tuple[Tensor, Tensor]:
        """Give the diagonal of J^T J: of each rank's row of ``down``, then of ``up``; (ranks,)."""
        weight = torch.cat((self.own.square().flatten(), self.pool.square().sum(0)))
        return weight * self.up.square().sum(1), weight * self.down.square().sum(1)

    def grams(self) -> tuple[_Blocks, _Blocks]:
        """Give the parts of J^T J that no step changes: up up^T o P and down down^T o P."""
        return self._products(self.up, self.up), self._products(self.down, self.down)

    def normal(self, step: Tensor, grams: tuple[_Blocks, _Blocks]) -> Tensor:
        """Compute J^T J z of a flat ``step`` z, with what ``grams`` gave."""
        result = torch.zeros_like(step)
        (down, up), (to_down, to_up) = self.split(step), self.split(result)
        self._add_product(to_down, grams[0], down)
        self._add_product(to_down, self._products(self.up, up), self.down)
        self._add_product(to_up, grams[1], up)
        self._add_product(to_up, self._products(self.down, down), self.up)
        return result

    def change(self, layer: int, step: Tensor) -> Tensor:
        """Compute (J z)_i (out, in), by which a flat ``step`` z changes a layer's weight."""
        down, up = self.split(step)
        weight = self._weight(layer)
        left = torch.cat((self._of(layer, up), self._of(layer, self.up))) * torch.cat((weight,) * 2)
        return left.t() @ torch.cat((self._of(layer, self.down), self._of(layer, down)))

    def add_gradient(self, layer: int, dense: Tensor, total: Tensor) -> None:
        """Add to ``total``, flat, J^T of a change ``dense`` (out, in) of one layer's weight."""
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

    The diagonals are folded in, and down and G_up turned into the eigenvectors of down down^T
    (values mu), up and G_down into those of up up^T (values lambda). There the Sylvester equation
    of the paper falls apart, C_ij = (G_down down^T)_ij / (lambda_i + mu_j + rho), and the rows of
    z are z_down = (G_down - C down) / (lambda + rho) and z_up = (G_up - C^T up) / (mu + rho). Where
    one of the factors is not trained, C is zero.

    Args:
        ranks: of L pairs.
        gradient: G, flat.
        trained: of the rows of ``down`` and ``up``, (2, L*r): 1 where trained, 0 where not.
        ridge: rho of a pair, over the mean of its diagonal of J^T J.

    Returns:
        z, flat; 0 where G is.
    """
    weight = ranks.own.unsqueeze(2)
    down, up = (weight * ranks.by_layer(rows) for rows in (ranks.down, ranks.up))
    of_down, of_up = (ranks.by_layer(rows) for rows in ranks.split(gradient))
    in_down, in_up = trained.view(2, ranks.layers, ranks.rank, 1).to(torch.float64)

    # Gram matrices square the conditioning; of r x r, float64 costs little.
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
    """Decompose rows rows^T (L, r, r) in float64; values that are but rounding errors are zero.

    Such are those of ranks whose diagonal is zero, as a closed gate's.
    """
    wide = rows.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    rounding = values[:, -1:] * wide.shape[1] * torch.finfo(wide.dtype).eps
    return torch.where(values > rounding, values, 0), vectors


def _inverse(values: Tensor) -> Tensor:
    """Invert, elementwise, what is not zero."""
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

    Wherever they are cut off, z minimises ||J z - g||^2 + rho ||z||^2 over the steps that they have
    seen; so z^T G > 0, and -z is a descent direction. One iteration gives the raw gradient, scaled.

    Args:
        ranks: of the group.
        gradient: G, flat, 0 where nothing is trained.
        trained: of the rows of ``down`` and ``up``, (2, ranks): 1 where trained, 0 where not.
        ridge: rho over the mean of the diagonal of J^T J.
        iterations: at most so many.
        tolerance: they end where the residual of the equation, over G, falls below this.

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
        # On a GPU the host is not made to wait for the residual: iterations after the end add zero.
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
