"""decompose: the RaSA factors closest to given weight changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rasa_ext import RasaConfig
from rasa_ext.linalg import Components, svd_of_product
from rasa_research.solver.coordinate_descent import CoordinateDescent
from rasa_research.solver.low_rank import Matrix, truncated_svd

Delta = Tensor | tuple[Tensor, Tensor]
"""A weight change (out, in), or factors (B, A) of it, (out, s) and (s, in)."""


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Factors of one group of L layers: dW_i = [B_i | pool_B] diag(d_i) [A_i ; pool_A].

    A[i] is (r-k, in), B[i] (out, r-k), and d[i] (r-k+L*k,), with r-k ones first. The rows of pool_A
    (L*k, in) and the columns of pool_B (out, L*k) have length one, or zero. All are in the dtype of
    the computation, on the device of the weight changes. See arXiv 2503.12576, section 3.

    Example:
        >>> from rasa_research import solver
        >>> deltas = [torch.randn(16, 12) for _ in range(3)]
        >>> found = solver.decompose(deltas, rank=4, k=1, iterations=5)
        >>> found.A[0].shape, found.d[0].shape, found.pool_A.shape
        (torch.Size([3, 12]), torch.Size([6]), torch.Size([3, 12]))
        >>> found.delta(0).shape
        torch.Size([16, 12])
        >>> found.errors[-1] < found.lora_error
        True
    """

    A: list[Tensor]
    B: list[Tensor]
    d: list[Tensor]
    pool_A: Tensor
    pool_B: Tensor
    errors: list[float]
    """sum ||M - M^||^2 / sum ||M||^2 at the start and after every iteration; 0 for zero targets."""
    lora_error: float
    """The relative squared error of LoRA's best approximation with rank r in every layer."""
    lora_error_equal: float
    """The error of LoRA with as many trainable parameters as this adapter. The r-k+L*k entries of
    each diagonal pay for one more rank in some layers; between whole ranks the error falls
    linearly. At k = 0, which is LoRA, it equals ``lora_error``."""
    norm: float
    """(sum ||M||^2)^(1/2) of the targets."""

    def delta(self, i: int) -> Tensor:
        """Return the approximation of layer i's weight change, (out, in)."""
        Bt = torch.cat([self.B[i], self.pool_B], 1) * self.d[i]
        return Bt @ torch.cat([self.A[i], self.pool_A])


@torch.no_grad()
def decompose(
    deltas: Sequence[Delta],
    rank: int,
    k: int | None,
    *,
    iterations: int = 50,
    init: str = "svd",
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Decomposition:
    """Approximate the weight changes of one group of layers by RaSA factors, rank r with k shared.

    Coordinate descent minimizes sum_i ||M_i - B_i A_i - B_S D_i A_S||^2 over the L layers (arXiv
    2503.12576, section 3 and appendix A; ``rasa_research.solver.coordinate_descent`` has the
    half-steps). No step raises the error. ``init="svd"`` starts at LoRA's minimum (the theorem of
    section 3), so for any k the result is never worse than LoRA of equal rank.

    Args:
        deltas: one weight change per layer: a tensor (out, in), or factors (B, A) of (out, s) and
            (s, in), whose product is never formed. All have one shape and one device.
        rank: LoRA rank r per layer.
        k: how many of the r ranks go to the pool, 0 <= k <= rank; None means max(rank // 8, 1).
        iterations: rounds of the four half-steps.
        init: "svd", the start of the theorem, or "random", drawn from torch's global generator.
        dtype: dtype of the computation and the result, float64 or float32.
        tol: stop when an iteration lowers the error by at most this; 0 runs all iterations.
        progress: called with (iterations done, iterations) after each iteration.

    Returns:
        The factors, the error of every iteration, and LoRA's errors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Example:
        >>> from rasa_research import solver
        >>> deltas = [torch.randn(16, 12) for _ in range(3)]
        >>> found = solver.decompose(deltas, rank=4, k=1, iterations=5)
        >>> len(found.errors)
        6
        >>> factors = [(torch.randn(16, 2), torch.randn(2, 12)) for _ in range(3)]
        >>> exact = solver.decompose(factors, rank=2, k=0)
        >>> torch.allclose(exact.delta(0), (factors[0][0] @ factors[0][1]).double(), atol=1e-5)
        True
    """
    config = RasaConfig(rank=rank, k=k)
    rank, k = config.rank, config.k
    assert k is not None  # RasaConfig replaces None by the default
    _check_options(iterations, init, dtype, tol)
    targets, norm = _targets(deltas, dtype)
    layers = len(targets)
    descent = CoordinateDescent(targets, rank - k, layers * k)
    more = (rank - k + layers * k) / sum(targets[0].shape) if k else 0.0
    components = [_leading(target, math.ceil(rank + more)) for target in targets]
    lora_error = _lora_error(targets, components, rank)
    if init == "svd":
        descent.start_from_theorem([_first(c, rank) for c in components], k)
    else:
        descent.start_at_random()
    errors = [descent.error()]
    for done in range(1, iterations + 1):
        descent.update()
        errors.append(descent.error())
        if progress is not None:
            progress(done, iterations)
        if tol and errors[-2] - errors[-1] <= tol:
            break
    descent.normalize_pool()
    ones = descent.d.new_ones(rank - k)
    return Decomposition(
        A=[A * norm**0.5 for A in descent.A],
        B=[B * norm**0.5 for B in descent.B],
        d=[torch.cat([ones, d * norm]) for d in descent.d],
        pool_A=descent.pool_A,
        pool_B=descent.pool_B,
        errors=errors,
        lora_error=lora_error,
        lora_error_equal=_lora_error(targets, components, rank + more),
        norm=norm if any(descent.norms) else 0.0,
    )


def _leading(target: Matrix, rank: int) -> Components:
    if target.right is not None:
        return _first(svd_of_product(target.left, target.right), rank)
    return truncated_svd(target, rank, torch.Generator().manual_seed(0))


def _first(components: Components, rank: int) -> Components:
    U, S, V = components
    return Components(U[:, :rank], S[:rank], V[:rank])


def _lora_error(targets: list[Matrix], components: list[Components], rank: float) -> float:
    """Return LoRA's minimal error, interpolated linearly between whole ranks."""
    whole = int(rank)
    total = 0.0
    for target, (_, S, _) in zip(targets, components, strict=True):
        squares = S.square()
        held = squares[:whole].sum() + (rank - whole) * squares[whole : whole + 1].sum()
        total += max(target.squared_norm() - held.item(), 0.0)
    return total


def _targets(deltas: Sequence[Delta], dtype: torch.dtype) -> tuple[list[Matrix], float]:
    """Return the targets divided by their common norm, and the norm (1 for zero targets)."""
    if isinstance(deltas, Tensor) or not isinstance(deltas, Sequence):
        raise TypeError(
            "deltas: expected a sequence of weight changes, one per layer, got "
            f"{type(deltas).__name__}."
        )
    if not deltas:
        raise ValueError("deltas: expected at least one weight change, got none.")
    targets = []
    for i in range(len(deltas)):
        targets.append(_target(f"deltas[{i}]", deltas[i], dtype))
        first, now = targets[0], targets[i]
        if now.shape != first.shape or now.left.device != first.left.device:
            raise ValueError(
                f"deltas[{i}]: expected the shape and device of deltas[0], {first.shape} on "
                f"{first.left.device}, got {now.shape} on {now.left.device}; decompose each group "
                "separately."
            )
    norm = sum(target.squared_norm() for target in targets) ** 0.5 or 1.0
    for i, target in enumerate(targets):  # one by one, to avoid a second copy of all targets
        targets[i] = Matrix(target.left / norm, target.right)
    return targets, norm


def _target(name: str, delta: Any, dtype: torch.dtype) -> Matrix:
    left, *right = (t.detach().to(dtype) for t in check_delta(name, delta))
    return Matrix(left, right[0] if right else None)


def check_delta(name: str, delta: Any) -> tuple[Tensor, ...]:
    """Return (dW,) or (B, A) of one weight change; raise TypeError or ValueError if invalid."""
    factors = tuple(delta) if isinstance(delta, tuple | list) else (delta,)
    if len(factors) > 2 or not all(isinstance(t, Tensor) for t in factors):
        kinds = ", ".join(type(t).__name__ for t in factors)
        raise TypeError(f"{name}: expected a tensor or a pair (B, A) of tensors, got {kinds}.")
    shapes = " and ".join(str(tuple(t.shape)) for t in factors)
    fits = all(t.dim() == 2 for t in factors) and (
        len(factors) == 1 or factors[0].shape[1] == factors[1].shape[0]
    )
    if not fits or 0 in (factors[0].shape[0], factors[-1].shape[1]):
        raise ValueError(
            f"{name}: expected (out, in), or (out, s) and (s, in), without a size of zero, "
            f"got {shapes}."
        )
    for tensor in factors:
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity.")
    return factors


def _check_options(iterations: int, init: str, dtype: torch.dtype, tol: float) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an integer, got {iterations!r}.")
    if iterations < 0:
        raise ValueError(f"iterations: expected 0 or more, got {iterations}.")
    if init not in ("svd", "random"):
        raise ValueError(f"init: expected 'svd' or 'random', got {init!r}.")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype}.")
    if not isinstance(tol, int | float) or not tol >= 0:
        raise ValueError(f"tol: expected a number, 0 or more, got {tol!r}.")
