"""pack_backward of one layer and of a group, against the oracle's gradients."""

from __future__ import annotations

import pytest
import torch
from emulated import (
    DTYPES,
    RANKS,
    SIZES,
    Memory,
    address,
    assert_within,
    by_ranks,
    dtype_of,
    epsilon,
    name,
    padded,
    random_adapter,
    run,
)
from torch import Tensor

from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.oracle import Adapter

MORE = [((64, 40), 16, 1), ((45, 24), 1, 0)]  # size, what the rank is padded to, offset
ORACLE = 1e-13  # the relative error of the oracle's own sums, which matters in float64 alone


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layer:
    """A layer whose pack has gradients that come from a random gradient of the dense weight."""

    def __init__(self, memory: Memory, adapter: Adapter, multiple: int):
        self.adapter = adapter
        own, self.rank = adapter.A.shape[0], adapter.d.numel()
        width, out, dtype = adapter.A.shape[1], adapter.B.shape[0], adapter.d.dtype
        self.S = torch.randn(out, width, dtype=torch.float64)
        down, up, d = adapter.stacked()
        # Pads hold NaN: they must not be looked at.
        pads = padded(self.rank, multiple) - self.rank
        self.dAp = memory.read(_with_pads((up * d).T @ self.S, pads).to(wide(dtype)))
        self.dBp = memory.read(_with_pads(down @ self.S.T, pads).to(wide(dtype)))
        self.inputs = by_ranks(adapter).map(memory.read)
        self.dA = memory.written((own, width), dtype)
        self.dB = memory.written((own, out), dtype)
        self.dd = memory.written((self.rank,), dtype)

    def layer(self, kernels):
        tensors = [self.dAp, self.dBp, self.inputs.B, self.inputs.d, self.dA, self.dB, self.dd]
        return kernels.PackBackwardLayer(*map(address, tensors))

    def assert_right(self) -> None:
        expected = oracle.adapter_grads(self.S, self.adapter)
        for field, actual in (("A", self.dA), ("B", self.dB.T)):
            assert_close(actual, expected[field])
        # dd is a sum over `out` of terms that cancel.
        up, T = self.adapter.stacked()[1], self.dBp[: self.rank].T.double()
        terms = (up * T).abs().sum(0)
        slack = terms * (16 * epsilon(wide(self.dd.dtype)) + ORACLE)
        assert_within(self.dd, expected["d"], slack + expected["d"].abs() * epsilon(self.dd.dtype))


def _with_pads(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, torch.full((rows, values.shape[1]), float("nan")).double()])


def assert_close(actual: Tensor, expected: Tensor, count: int = 1) -> None:
    """To the rounding of what comes in, of ``count`` products and sums, and of the result."""
    scale = expected.abs().max() if expected.numel() else 0
    wide_error = ((2 + 2 * count) * epsilon(wide(actual.dtype)) + ORACLE) * scale
    least = 2.0**-24 * (actual.dtype == torch.float16)
    assert_within(actual, expected, expected.abs() * epsilon(actual.dtype) + wide_error + least)


class Call:
    """Layers of one group, and the pool's gradients, by rows."""

    def __init__(self, memory: Memory, layers: list[Layer]):
        self.layers = layers
        first = layers[0].adapter
        (own, self.width), self.out = first.A.shape, first.B.shape[0]
        self.dtype, self.sizes = first.d.dtype, (own, first.d.numel() - own)
        self.dA_pool = memory.written((self.sizes[1], self.width), self.dtype)
        self.dB_pool = memory.written((self.sizes[1], self.out), self.dtype)

    def run(self, kernels, memory: Memory) -> None:
        table = [layer.layer(kernels) for layer in self.layers]
        pool = map(address, (self.layers[0].inputs.B_pool, self.dA_pool, self.dB_pool))
        sizes = (self.width, self.out, *self.sizes, dtype_of(kernels, self.dtype))
        call = (table, *pool, *sizes)
        launches = kernels.counts()["launches"]
        run(kernels, memory, lambda: kernels.pack_backward(*call))
        assert kernels.counts()["launches"] == launches + 3  # one for each schedule


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rank", RANKS)
def test_one_layer(kernels, rank, dtype):
    # Away from 16 bytes only what is aligned otherwise changes its path.
    for size, multiple, offset in [(size, 16, 0) for size in SIZES] + MORE:
        memory = Memory(offset)
        layer = Layer(memory, random_adapter(*RANKS[rank], size, dtype), multiple)
        call = Call(memory, [layer])
        call.run(kernels, memory)
        layer.assert_right()
        expected = oracle.adapter_grads(layer.S, layer.adapter)
        assert_close(call.dA_pool, expected["A_pool"])
        assert_close(call.dB_pool.T, expected["B_pool"])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rank", RANKS)
def test_the_layers_of_a_group(kernels, rank, dtype):
    own, pooled = RANKS[rank]
    long = [((1030, 9), 5)] * (rank <= 48)  # pieces of a row do not know its number
    for size, count in [((33, 17), 2), ((16, 131), 3), *long]:
        memory = Memory()
        first = random_adapter(own, pooled, size, dtype)
        adapters = [random_adapter(own, pooled, size, dtype) for _ in range(count)]
        layers = [
            Layer(memory, Adapter(a.A, first.A_pool, a.B, first.B_pool, a.d), 16) for a in adapters
        ]
        call = Call(memory, layers)
        call.run(kernels, memory)
        expected = [oracle.adapter_grads(layer.S, layer.adapter) for layer in layers]
        for layer in layers:
            layer.assert_right()
        # Sums may cancel: the bound is that of the terms.
        for actual, field in ((call.dA_pool, "A_pool"), (call.dB_pool.T, "B_pool")):
            total = sum(grads[field] for grads in expected)
            terms = sum(grads[field].abs() for grads in expected)
            scale = terms.max() if terms.numel() else 0
            slack = ((2 + 2 * count) * epsilon(wide(dtype)) + ORACLE) * scale
            least = 2.0**-24 * (dtype == torch.float16)
            assert_within(actual, total, total.abs() * epsilon(dtype) + slack + least)


def test_the_pytorch_kernel_agrees(kernels):
    memory = Memory()
    layer = Layer(memory, random_adapter(7, 32, (64, 300), torch.float32), 16)
    call = Call(memory, [layer])
    call.run(kernels, memory)
    adapter = layer.adapter
    outputs = ops.pack_backward(layer.dAp, layer.dBp.clone(), adapter.B, adapter.B_pool, adapter.d)
    ours = (layer.dA, call.dA_pool, layer.dB.T, call.dB_pool.T, layer.dd)
    for name_, mine, theirs in zip(("A", "A_pool", "B", "B_pool"), ours, outputs, strict=False):
        assert torch.equal(mine, theirs), name_
    torch.testing.assert_close(ours[4], outputs[4], rtol=1e-5, atol=1e-5)


def test_no_layers(kernels):
    launches = kernels.counts()["launches"]
    kernels.pack_backward([], 0, 0, 0, 4, 4, 1, 1, kernels.DType.float32)
    assert kernels.counts()["launches"] == launches
