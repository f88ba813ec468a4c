"""The products of one adapted linear's training step, each with as little other work as possible.

Products with one narrow side run as operators of the package that compute little else: with only
``need_B`` the backward is dBp, with only ``need_A`` it is H and dAp. ``cublas`` after a name means
without the kernels of csrc/cuda/skinny.cuh. The base's products are torch's: with beta = 1, as in
the operators, and with beta = 0, as in a frozen linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import cublas
from benchmarks.roofline import Work
from benchmarks.shapes import Linear
from rasa_ext import ops


@dataclass(frozen=True)
class Product:
    """A call, with the bytes that it reads and writes and the FLOPs that it computes."""

    run: Callable[[], object]
    work: Work


def multiply(a: Tensor, b: Tensor, c: Tensor, beta: int = 0) -> Product:
    """Return the product c (m, n) = a (m, k) b (k, n) + beta c."""

    def run() -> None:
        if beta:
            c.addmm_(a, b)
        else:
            torch.mm(a, b, out=c)

    moved = a.nbytes + b.nbytes + (1 + beta) * c.nbytes
    return Product(run, Work(moved, 2 * a.numel() * b.shape[1]))


def of_linear(
    linear: Linear, M: int, rank: int, dtype: torch.dtype, device: str
) -> dict[str, Product]:
    """Return the products by name and formula; ``rank`` is padded as the operators pad it."""
    multiple = ops.rank_multiple(device)
    width, out, padded = linear.in_features, linear.out_features, -(-rank // multiple) * multiple

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    X, Y, G, dX = draw(M, width), draw(M, out), draw(M, out), draw(M, width)
    W, Ap, Bp = draw(out, width) / width**0.5, draw(padded, width), draw(padded, out)
    U = draw(M, padded)
    mask = torch.randint(256, (-(-X.numel() // 8),), dtype=torch.uint8, device=device)

    def backward(*need: bool, drop: tuple = ()) -> Callable[[], object]:
        return partial(ops.low_rank_linear_backward, G, X, None, U, Ap, Bp, *need, *drop)

    x, y, u = X.nbytes, Y.nbytes, U.nbytes
    down, up, wide = Ap.nbytes, Bp.nbytes, ops.accumulation_dtype(dtype).itemsize
    dAp, dBp, bits = wide * Ap.numel(), wide * Bp.numel(), mask.nbytes
    of_x, of_y = 2 * M * padded * width, 2 * M * padded * out
    U_and_Y = partial(ops.low_rank_add, Y, X, Ap, Bp)
    H_and_dAp, drop = y + up + 2 * u + x + dAp, (mask, 1.25)
    ours = {
        "U = X Ap^T, Y + U Bp": Product(U_and_Y, Work(x + down + 2 * u + 2 * y + up, of_x + of_y)),
        "the same, dropout": Product(
            partial(U_and_Y, *drop), Work(x + bits + down + 2 * u + 2 * y + up, of_x + of_y)
        ),
        "H = G Bp^T, dX = H Ap": Product(
            backward(True, False, False), Work(y + up + 2 * u + down + x, of_x + of_y)
        ),
        "dBp = U^T G": Product(backward(False, False, True), Work(u + y + dBp, of_y)),
        "H, dAp = H^T X": Product(backward(False, True, False), Work(H_and_dAp, of_x + of_y)),
        "H, dAp, dropout": Product(
            backward(False, True, False, drop=drop), Work(H_and_dAp + bits, of_x + of_y)
        ),
        "H, dBp, dAp": Product(
            backward(False, True, True), Work(H_and_dAp + u + dBp, of_x + 2 * of_y)
        ),
    }
    found = dict(ours)
    for name, product in ours.items():
        found[f"{name}, cublas"] = Product(cublas()(product.run), product.work)
    found |= {
        "Y += X W^T": multiply(X, W.t(), Y, 1),
        "Y = X W^T": multiply(X, W.t(), Y),
        "dX += G W": multiply(G, W, dX, 1),
        "dX = G W": multiply(G, W, dX),
    }
    return found
