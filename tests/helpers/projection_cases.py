"""Draw tensors for linear_projections, and compute its results by formulas and by operators."""

import torch

from rasa_ext import ops
from tests.helpers import linear_cases

# (tokens, in, ((out, Rp), ...)): grouped-query attention, no tokens, one layer, different ranks,
# and empty sums.
SHAPES = (
    (5, 9, ((7, 9), (2, 9), (2, 9))),
    (0, 6, ((4, 6), (3, 6))),
    (4, 5, ((3, 3),)),
    (33, 65, ((31, 39), (1, 9))),
    (18, 6, ((4, 2), (3, 1), (4, 0))),
    (5, 0, ((4, 2), (3, 1))),
    (17, 6, ((0, 2), (3, 1))),
)


def draw(shape, dtype, device):
    """Draw x, weights, biases (the last is empty), Ap, Bp, grads and U."""
    M, width, layers = shape

    def random(*size):
        return torch.randn(*size, dtype=dtype, device=device)

    ranks = sum(rank for _, rank in layers)
    return [
        random(M, width),
        [random(out, width) for out, _ in layers],
        [random(out) for out, _ in layers[:-1]] + [random(0)],
        random(ranks, width),
        [random(rank, out) for out, rank in layers],
        [random(M, out) for out, _ in layers],
        random(M, ranks),
    ]


def formulas(x, weights, biases, Ap, Bp, grads, saved, kept=None):
    """Apply the formulas of one layer to each layer, and sum the gradients of x."""
    ranks, found = [len(up) for up in Bp], {"dx": 0}
    parts = zip(weights, Ap.split(ranks), Bp, grads, saved.split(ranks, 1), strict=True)
    for i, (weight, *rest) in enumerate(parts):
        bias = biases[i] if biases and biases[i].numel() else None
        one = linear_cases.formulas(x, weight, bias, *rest, kept)
        found |= {f"{name}{i}": one[name] for name in ("y", "U", "dAp", "dBp")}
        found["dx"] = found["dx"] + one["dx"]
    return found


def operators(x, weights, biases, Ap, Bp, grads, saved, *mask):
    y, U = ops.linear_projections(x, weights, biases, Ap, Bp, *mask)
    dx, dAp, dBp = ops.linear_projections_backward(
        grads, x, weights, saved, Ap, Bp, True, True, True, *mask
    )
    ranks = [len(up) for up in Bp]
    found = {"dx": dx}
    for i, parts in enumerate(zip(y, U.split(ranks, 1), dAp.split(ranks), dBp, strict=True)):
        found |= dict(zip((f"y{i}", f"U{i}", f"dAp{i}", f"dBp{i}"), parts, strict=True))
    return found
