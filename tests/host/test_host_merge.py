"""Computing dW of a group's layers and adding it to weights, in batches or in place."""

import pytest
import torch

import rasa_ext
from tests.helpers.adapters import patched
from tests.helpers.models import LLAMA


def draw_packs(layers, width, out, rank):
    return torch.randn(layers, rank, width), torch.randn(layers, rank, out)


def test_products(host):
    """float32 weights use one product each, without TF32; others a float32 batch."""
    Ap, Bp = draw_packs(3, 5, 6, 4)
    weights = [torch.randn(6, 5) for _ in range(3)]
    host.reset()
    host.ops.merge_group(weights, Ap, Bp)
    host.ops.merge_group([w.bfloat16() for w in weights], Ap, Bp)
    host.ops.delta_group(Ap, Bp)
    rest = "m=5 n=6 k=4 batch=3 beta={} out=4 math=16"
    strides = " strides=20,24,30"
    assert host.calls() == [
        *["Matmul m=5 n=6 k=4 batch=1 beta=1 out=4 compute=32F"] * 3,
        "GemmStridedBatchedEx " + rest.format(1) + strides,
        "GemmStridedBatchedEx " + rest.format(0) + strides,
    ]


def test_a_group_of_a_model_is_one_batch(host, monkeypatch):
    """A model's group is merged in one batch, and autograd sees that weights have changed."""
    model = patched(LLAMA.build().bfloat16()).train()
    _, loss = LLAMA.loss(model, LLAMA.inputs(0))
    host.take_over(monkeypatch)
    host.reset()
    rasa_ext.merge(model)
    merged = [call for call in host.calls() if "beta=1" in call]
    assert [" batch=3 " in call for call in merged] == [True] * 7
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merge_in_steps(host):
    """For large layers, float32 sums are in memory one layer after the other, not all at once."""
    Ap, Bp = draw_packs(2, 8192, 4500, 1)
    weights = [torch.zeros(4500, 8192, dtype=torch.bfloat16) for _ in range(2)]
    host.reset()
    host.ops.merge_group(weights, Ap, Bp)
    assert len(host.calls()) == 2
    for weight, down, up in zip(weights, Ap, Bp, strict=True):
        assert torch.equal(weight, (up.T @ down).bfloat16())


def test_refusals(host):
    Ap, Bp = draw_packs(2, 5, 6, 4)
    weights = [torch.randn(6, 5) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"Bp: expected shape \(2, 4, \*\), got"):
        host.ops.delta_group(Ap, Bp[:, :3])
    with pytest.raises(RuntimeError, match="Ap: expected as many layers as weights has, 1, got 2"):
        host.ops.merge_group(weights[:1], Ap, Bp)
    with pytest.raises(RuntimeError, match=r"weights: expected shape \(6, 5\), got shape \(5, 6\)"):
        host.ops.merge_group([weights[0], weights[1].t()], Ap, Bp)
    with pytest.raises(RuntimeError, match="weights: expected the dtype of"):
        host.ops.merge_group([weights[0], weights[1].half()], Ap, Bp)
