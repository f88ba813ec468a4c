"""Projections of one x: one down-projection for all layers, then the products of each layer."""

import pytest
import torch

from tests.helpers.projection_cases import SHAPES, draw


def test_products(host):
    """All layers share one down-projection, and in the backward one product for dAp."""
    shape = (17, 9, ((12, 16), (4, 16), (4, 16)))
    *tensors, grads, U = draw(shape, torch.bfloat16, "cpu")
    x, weights, _, Ap, Bp = tensors
    host.reset()
    host.ops.linear_projections(*tensors)
    # test_host_predict.py has the products. Each adapter's adds the bias; the last one has none.
    biased = [" bias" in call for call in host.calls()]
    assert biased == [False, True, True, False, False, False, False]
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens.
    # Each H_i and then dBp_i, which read the same gradient; then dAp, dx and the bases.
    H = ["m=16 n=17 k=12", "m=16 n=17 k=4", "m=16 n=17 k=4"]
    dBp = ["m=12 n=16 k=17", "m=4 n=16 k=17", "m=4 n=16 k=17"]
    dAp, dx = ["m=9 n=48 k=17"], ["m=9 n=17 k=48", "m=9 n=17 k=12", "m=9 n=17 k=4", "m=9 n=17 k=4"]
    both = [call for pair in zip(H, dBp, strict=True) for call in pair]
    products = {
        (True, True, True): both + dAp + dx,
        (True, False, True): both + dx,
        (True, True, False): H + dAp + dx,
        (False, True, True): both + dAp,
        (False, False, True): dBp,
        (False, False, False): [],
    }
    for need, expected in products.items():
        host.reset()
        host.ops.linear_projections_backward(grads, x, weights, U, Ap, Bp, *need)
        assert [c.partition(" ")[2].partition(" batch")[0] for c in host.calls()] == expected
        assert all(("out=4" in c) == any(f" {p} " in c for p in dBp + dAp) for c in host.calls())


def test_bad_input(host):
    x, weights, _, Ap, Bp, *_ = draw(SHAPES[0], torch.float32, "cpu")
    linear = host.ops.linear_projections
    with pytest.raises(RuntimeError, match=r"Ap: expected shape"):
        linear(x, weights, [], Ap[1:], Bp)
    with pytest.raises(RuntimeError, match=r"Bp: expected as many layers as weights has, 3, got 2"):
        linear(x, weights, [], Ap, Bp[:2])
    with pytest.raises(RuntimeError, match=r"biases\[i\]: expected shape"):
        linear(x, weights, [torch.zeros(3)] * 3, Ap, Bp)
    with pytest.raises(RuntimeError, match=r"weights\[i\]"):
        linear(x, [weights[0].half(), *weights[1:]], [], Ap, Bp)
