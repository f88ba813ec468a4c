"""The matrix products of one adapted linear's training step, as csrc/linear_plan.h lists them.

Torch calls cuBLAS for them with the operands, strides and dtypes that the compiled operators have.
The base's comes with beta = 1, as the operators have it, and with beta = 0, as a frozen linear has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.roofline import Work
from benchmarks.shapes import Linear
from rasa_ext import ops


@dataclass(frozen=True)
class Product:
    """A call, and what it reads, writes and computes."""

    run: Callable[[], object]
    work: Work


def multiply(a: Tensor, b: Tensor, c: Tensor, beta: int = 0) -> Product:
    """c (m, n) = a (m, k) b (k, n) + beta c; c is float32 where weight gradients are."""

    def run() -> None:
        if beta:
            c.addmm_(a, b)
        elif c.dtype == a.dtype:
            torch.mm(a, b, out=c)
        else:
            torch.mm(a, b, out_dtype=c.dtype, out=c)

    moved = a.nbytes + b.nbytes + (1 + beta) * c.nbytes
    return Product(run, Work(moved, 2 * a.numel() * b.shape[1]))


def of_linear(
    linear: Linear, M: int, rank: int, dtype: torch.dtype, device: str
) -> dict[str, Product]:
    """By name and formula; ``rank`` is padded as the operators pad it."""
    multiple = ops.rank_multiple(device)
    width, out, padded = linear.in_features, linear.out_features, -(-rank // multiple) * multiple
    # A CPU has no product of two dtypes.
    wide = ops.accumulation_dtype(dtype) if device.startswith("cuda") else dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    X, Y, G, dX = draw(M, width), draw(M, out), draw(M, out), draw(M, width)
    W, Ap, Bp = draw(out, width) / width**0.5, draw(padded, width), draw(padded, out)
    U, H = draw(M, padded), draw(M, padded)
    dAp, dBp = (torch.empty_like(pack, dtype=wide) for pack in (Ap, Bp))
    return {
        "U = X Ap^T": multiply(X, Ap.t(), U),
        "Y = U Bp": multiply(U, Bp, Y),
        "Y += X W^T": multiply(X, W.t(), Y, 1),
        "Y = X W^T": multiply(X, W.t(), Y),
        "H = G Bp^T": multiply(G, Bp.t(), H),
        "dBp = U^T G": multiply(U.t(), G, dBp),
        "dAp = H^T X": multiply(H.t(), X, dAp),
        "dX = H Ap": multiply(H, Ap, dX),
        "dX += G W": multiply(G, W, dX, 1),
        "dX = G W": multiply(G, W, dX),
    }
