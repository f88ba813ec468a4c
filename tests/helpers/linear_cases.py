"""Draw tensors for low_rank_linear, and compute its results by formulas and by operators."""

import itertools

import torch

from rasa_ext import ops
from tests.helpers.operators import drop

# (in, out, Rp) with empty sums.
EMPTY = ((0, 6, 3), (5, 0, 3), (5, 6, 0), (0, 6, 0), (0, 0, 3), (5, 0, 0))
# Whether dx, dAp and dBp are needed.
NEEDS = list(itertools.product((True, False), repeat=3))


def draw(shape, dtype, device):
    """Draw x, weight, bias, Ap, Bp, grad and an independent U."""
    M, width, out, Rp = shape
    sizes = ((M, width), (out, width), (out,), (Rp, width), (Rp, out), (M, out), (M, Rp))
    return [torch.randn(size, dtype=dtype, device=device) for size in sizes]


def formulas(x, weight, bias, Ap, Bp, grad, saved, kept=None):
    U, H = drop(x, kept) @ Ap.T, grad @ Bp.T
    return {
        "y": x @ weight.T + U @ Bp + (0 if bias is None else bias),
        "U": U,
        "dx": grad @ weight + drop(H @ Ap, kept),
        "dAp": H.T @ drop(x, kept),
        "dBp": saved.T @ grad,
        "added": grad + U @ Bp,
        "dx_add": drop(H @ Ap, kept),
    }


def operators(x, weight, bias, Ap, Bp, grad, saved, *mask):
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bp, *mask)
    added, _ = ops.low_rank_add(grad, x, Ap, Bp, *mask)
    backward = ops.low_rank_linear_backward
    dx, dAp, dBp = backward(grad, x, weight, saved, Ap, Bp, True, True, True, *mask)
    dx_add, *_ = backward(grad, None, None, None, Ap, Bp, True, False, False, *mask)
    found = {"y": y, "U": U, "dx": dx, "dAp": dAp, "dBp": dBp}
    return {**found, "added": added, "dx_add": dx_add}
