"""Draw tensors for linear_group, and compute its results by formulas and by operators."""

import torch

from rasa_ext import ops


def draw(shape, dtype, device):
    """Draw x, weights, bias, Ap, Bp, grad and an independent U."""
    layers, tokens, width, out, rank = shape

    def random(*size):
        return torch.randn(*size, device=device).to(dtype)

    x, weights = random(layers, tokens, width), [random(out, width) for _ in range(layers)]
    sizes = (out,), (rank, width), (rank, out), (tokens, out), (tokens, rank)
    return [x, weights, *(random(layers, *size) for size in sizes)]


def formulas(x, weights, bias, Ap, Bp, grad, saved, kept=None):
    W, U, H = torch.stack(weights), x @ Ap.mT, grad @ Bp.mT
    return {
        "y": x @ W.mT + U @ Bp + (0 if bias is None else bias[:, None]),
        "U": U,
        "dx": grad @ W + H @ Ap,
        "dAp": H.mT @ x,
        "dBp": saved.mT @ grad,
    }


def operators(x, weights, bias, Ap, Bp, grad, saved):
    y, U = ops.linear_group(x, weights, bias, Ap, Bp)
    dx, dAp, dBp = ops.linear_group_backward(grad, x, weights, saved, Ap, Bp, True, True)
    return {"y": y, "U": U, "dx": dx, "dAp": dAp, "dBp": dBp}
