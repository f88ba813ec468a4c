"""The operators over a whole group: which products the host code passes to cuBLAS, and how."""

import pytest
import torch

from tests.helpers.group_cases import draw, formulas, operators
from tests.helpers.operators import DTYPES, check_values, columns, shifted


@pytest.fixture
def check(host, monkeypatch):
    """A function that checks the operators' values and returns their cuBLAS calls."""
    host.take_over(monkeypatch)

    def run(tensors) -> list[str]:
        host.reset()
        check_values(operators, formulas, tensors)
        return host.calls()

    return run


def test_products(host):
    x, weights, bias, Ap, Bp, grad, U = draw((3, 16, 8, 24, 2), torch.bfloat16, "cpu")
    host.reset()
    host.ops.linear_group(x, weights, bias, Ap, Bp)
    # Row-major results are cuBLAS's transposes: m is the width, n the tokens. The strides are of
    # cuBLAS's operands A and B and of the result.
    batch = "GemmStridedBatchedEx m={} n={} k={} batch=3 beta={} out={} math=19 strides={}"
    assert host.calls() == [
        batch.format(2, 16, 8, 0, 2, "16,128,32"),
        batch.format(24, 16, 2, 1, 2, "48,32,384"),
        "GemmBatchedEx m=24 n=16 k=8 batch=3 beta=1 out=2 math=19",
    ]
    args = grad, x, weights, U, Ap, Bp
    host.reset()
    host.ops.linear_group_backward(*args, True, True)
    assert host.calls() == [
        batch.format(2, 16, 24, 0, 2, "48,384,32"),
        batch.format(24, 2, 16, 0, 4, "384,32,48"),
        batch.format(8, 2, 16, 0, 4, "128,32,16"),
        batch.format(8, 16, 2, 0, 2, "16,32,128"),
        "GemmBatchedEx m=8 n=16 k=24 batch=3 beta=1 out=2 math=19",
    ]
    counts = {(True, False): 3, (False, True): 3, (False, False): 0}
    for need, count in counts.items():
        host.reset()
        host.ops.linear_group_backward(*args, *need)
        assert len(host.calls()) == count, need
    assert host.math_mode() == 3, "torch's math mode is put back"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["x", "weights", "layers"])
def test_what_lies_worse_than_at_16_bytes_is_no_batch_by_pointers(check, place, dtype):
    """A batch by pointers must be aligned to 16 bytes.

    cuBLAS does not check the pointers, and its kernels may fault.
    """
    tokens, width = (15, 9) if place == "layers" else (16, 8)
    tensors = draw((3, tokens, width, 24, 8), dtype, "cpu")

    if place == "x":
        tensors[0] = shifted(tensors[0])
    elif place == "weights":
        tensors[1][1] = shifted(tensors[1][1])
    pointers = [call for call in check(tensors) if call.startswith("GemmBatchedEx")]
    assert len(pointers) == (place == "x")  # dx's product does not read x


def test_more_layers_than_a_table_of_one_launch(check):
    """200 layers need two launches to write the table of pointers.

    A batch has three pointers for each layer, and one launch writes 510 words.
    """
    calls = check(draw((200, 2, 8, 8, 4), torch.float32, "cpu"))
    assert sum("GemmBatchedEx" in call for call in calls) == 2


def test_large_base_products_go_alone(check):
    """Base products that fill a device are computed layer by layer, forward and backward."""
    calls = check(draw((2, 128 * 11 + 1, 4, 128 * 11, 1), torch.float32, "cpu"))
    bases = [call for call in calls if call.startswith("Matmul")]
    assert [call.split(" batch")[0] for call in bases] == ["Matmul m=1408 n=1409 k=4"] * 2
    assert sum("GemmBatchedEx" in call for call in calls) == 1  # dx is narrow
    x, weights, *rest, grad, U = draw((2, 128 * 11 + 1, 128 * 11, 4, 1), torch.float32, "cpu")
    calls = check([x, [*map(columns, weights)], *rest, columns(grad), U])
    assert sum("GemmBatchedEx" in call for call in calls) == 1  # y is narrow


def test_refusals(host):
    x, weights, bias, Ap, Bp, grad, _ = draw((3, 5, 9, 7, 9), torch.float32, "cpu")
    call = host.ops.linear_group
    with pytest.raises(RuntimeError, match=r"linear_group: Bp: expected shape \(3, 9, \*\), got"):
        call(x, weights, bias, Ap, Bp[:, :2])
    with pytest.raises(RuntimeError, match=r"Ap: expected shape \(3, \*, 9\), got shape"):
        call(x, weights, bias, Ap[:2], Bp)
    with pytest.raises(RuntimeError, match="weights: expected as many layers as x has, 3, got 2"):
        call(x, weights[:2], bias, Ap, Bp)
    with pytest.raises(RuntimeError, match=r"weights: expected shape \(7, 9\), got shape \(9, 7\)"):
        call(x, [w.t() for w in weights], bias, Ap, Bp)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \(3, 7\), got shape \(7\)"):
        call(x, weights, bias[0], Ap, Bp)
    with pytest.raises(RuntimeError, match=r"backward: U: expected shape \(3, 5, 9\), got shape"):
        host.ops.linear_group_backward(grad, x, weights, x[:, :4], Ap, Bp, True, True)
