"""benchmarks/passes.py lists the host code's cuBLAS products in the right order."""

import re

import pytest
import torch

from benchmarks import passes
from benchmarks.shapes import Linear

IN, POOLED, R = 64, 9, 16


def asked(host) -> list[tuple[int, ...]]:
    """Return (rows, columns, inner, beta) of every product."""
    pattern = r"m=(\d+) n=(\d+) k=(\d+) batch=1 beta=(\d+) "
    found = [map(int, re.search(pattern, call).groups()) for call in host.calls()]
    # Row-major results are cuBLAS's transposes: m is the width.
    return [(n, m, k, beta) for m, n, k, beta in found]


def listed(name: str, tokens: int, widths: list[int], biased: bool) -> list[tuple[int, ...]]:
    linears = [Linear(f"l{i}", IN, width, "x") for i, width in enumerate(widths)]
    setting = passes.Setting(
        tokens, R, POOLED, itemsize=2, multiple=16, biased=biased, kernels=True
    )
    ops = passes.ops(passes.BY_NAME[name], linears, setting)
    products = [(op, op.writes[0]) for op in ops if op.kind == "product"]
    return [(to.rows, to.cols, op.inner, int(op.added_to is not None)) for op, to in products]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("tokens", [33, 1024])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_alone(host, biased, tokens):
    out = 48
    x, weight, grad = draw(tokens, IN), draw(out, IN), draw(tokens, out)
    pack = draw(R, IN), draw(R, out)
    host.reset()
    _, U = host.ops.low_rank_linear(x, weight, draw(out) if biased else None, *pack)
    host.ops.low_rank_linear_backward(grad, x, weight, U, *pack, True, True, True)
    assert asked(host) == listed("ours", tokens, [out], biased)


@pytest.mark.parametrize("tokens", [33, 1024])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [[48, 24, 40], [48, 24, 24]])
def test_fused_projections(host, widths, biased, tokens):
    x, weights = draw(tokens, IN), [draw(out, IN) for out in widths]
    Ap, Bp = draw(R * len(widths), IN), [draw(R, out) for out in widths]
    host.reset()
    biases = [draw(out) for out in widths] if biased else []
    _, U = host.ops.linear_projections(x, weights, biases, Ap, Bp)
    grads = [draw(tokens, out) for out in widths]
    host.ops.linear_projections_backward(grads, x, weights, U, Ap, Bp, True, True, True)
    assert asked(host) == listed("ours fused", tokens, widths, biased)
