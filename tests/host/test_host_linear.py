"""The host code of the low-rank linear: cuBLAS calls, dropout's mask, errors for bad input."""

import pytest
import torch

from tests.helpers.linear_cases import draw
from tests.helpers.operators import DTYPES, random_mask

SHAPE = (17, 9, 7, 3)


def test_products(host):
    """No result of a backward is unused. test_host_predict.py has the products of a forward."""
    x, weight, _, Ap, Bp, grad, U = draw(SHAPE, torch.bfloat16, "cpu")
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens. Each product
    # follows one that used the same tensor: G for dBp, H for dAp, dx for the base.
    H, dBp = "Matmul m=3 n=17 k=7", "Matmul m=7 n=3 k=17"
    dAp, dx, add = "Matmul m=9 n=3 k=17", "Matmul m=9 n=17 k=3", "Matmul m=9 n=17 k=7"
    counts = {
        (True, True, True): [H, dBp, dAp, dx, add],
        (True, True, False): [H, dAp, dx, add],
        (True, False, True): [H, dBp, dx, add],
        (True, False, False): [H, dx, add],
        (False, True, True): [H, dBp, dAp],
        (False, True, False): [H, dAp],
        (False, False, True): [dBp],
        (False, False, False): [],
    }
    for need, products in counts.items():
        host.reset()
        found = host.ops.low_rank_linear_backward(grad, x, weight, U, Ap, Bp, *need)
        assert [call.partition(" batch")[0] for call in host.calls()] == products, need
        assert all(("out=4" in c) == c.startswith((dAp, dBp)) for c in host.calls())
        assert all(("beta=1" in c) == c.startswith(add) for c in host.calls())
        if need[2]:  # summed in float32, never rounded to the low precision
            torch.testing.assert_close(found[2], U.float().T @ grad.float())
    assert host.math_mode() == 3, "torch's math mode is put back"


def test_products_under_a_mask(host):
    """A mask adds no products: scales are passed as alpha, and the base is last."""
    x, weight, bias, Ap, Bp, grad, U = draw(SHAPE, torch.bfloat16, "cpu")
    counts = []
    for mask in ((), (random_mask(x), 1.375)):
        host.reset()
        host.ops.low_rank_linear(x, weight, bias, Ap, Bp, *mask)
        args = grad, x, weight, U, Ap, Bp, True, True, True
        host.ops.low_rank_linear_backward(*args, *mask)
        counts.append(host.calls())
    assert counts[0] == counts[1]
    assert "beta=1" in counts[1][-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens(host, dtype):
    """Up to 16 tokens, cuBLAS computes only the base, except in float64, which has no kernel."""
    for tokens in (1, 16):
        x, weight, _, Ap, Bp, *_ = draw((tokens, 9, 7, 3), dtype, "cpu")
        host.reset()
        host.ops.low_rank_linear(x, weight, None, Ap, Bp)
        expected = 3 if dtype == torch.float64 else 1
        assert len(host.calls()) == expected
        assert f"m=7 n={tokens} k=9 batch=1 beta={int(expected == 3)}" in host.calls()[-1]


def test_the_mask_comes_from_both_words(host):
    """The mask depends only on the random stream's key and offset."""
    x = torch.ones(100, 33)
    words = [1, 2], [1, 2], [2, 2], [1, 3]
    drawn = [host.ops.dropout(torch.tensor(each), x, 0.25) for each in words]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][1:], drawn[3][:-1])
    assert not torch.equal(drawn[0], drawn[2])
    assert host.ops.dropout(torch.tensor([1, 2]), x[:0], 0.25).shape == (0,)


BAD = [
    ({"weight": torch.ones(7, 8)}, r"low_rank_linear: weight: .*\(\*, 9\), got shape \(7, 8\)"),
    ({"weight": torch.ones(7, 9).half()}, r"weight: expected the dtype of x, float32, got fl"),
    ({"Ap": torch.ones(9)}, r"Ap: expected shape \(\*, 9\), got shape \(9\)"),
    ({"Bp": torch.ones(4, 7)}, r"Bp: expected shape \(3, 7\), got shape \(4, 7\)"),
    ({"bias": torch.ones(6)}, r"bias: expected shape \(7\), got shape \(6\)"),
    ({"x": torch.ones(2, 5, 9)}, r"x: expected shape \(\*, \*\), got shape \(2, 5, 9\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refusals(host, change, message):
    tensors = draw((5, 9, 7, 3), torch.float32, "cpu")
    args = dict(zip(("x", "weight", "bias", "Ap", "Bp"), tensors, strict=False))
    with pytest.raises(RuntimeError, match=message):
        host.ops.low_rank_linear(*(args | change).values())


BAD_MASKS = [
    (torch.ones(5, dtype=torch.uint8), r"mask: expected shape \(6\), got shape \(5\)"),
    (torch.ones(6), "mask: expected Byte, got Float"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS)
def test_refusals_of_a_mask(host, mask, message):
    x, weight, _, Ap, Bp, grad, U = draw((5, 9, 7, 3), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=f"low_rank_linear: {message}"):
        host.ops.low_rank_linear(x, weight, None, Ap, Bp, mask, 1.0)
    with pytest.raises(RuntimeError, match=f"low_rank_add: {message}"):
        host.ops.low_rank_add(grad, x, Ap, Bp, mask, 1.0)
    args = grad, x, weight, U, Ap, Bp, True, True, True, mask, 1.0
    with pytest.raises(RuntimeError, match=f"low_rank_linear_backward: {message}"):
        host.ops.low_rank_linear_backward(*args)


def test_integers_are_refused(host):
    ones = torch.ones(3, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expected float32, float64, float16 or bfloat16"):
        host.ops.low_rank_add(ones, ones, ones, ones)
