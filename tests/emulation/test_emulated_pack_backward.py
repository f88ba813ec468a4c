"""pack_backward and its form for many layers, against the oracle's gradients."""

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
    dtype_of,
    epsilon,
    name,
    padded,
    random_adapter,
    run,
)
from torch import Tensor

from rasa_ext.ops import reference
from tests.helpers import oracle
from tests.helpers.oracle import Adapter

ORACLE = 1e-13  # the relative error of the oracle's own sums, which matters in float64 alone


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layer:
    """A layer whose pack has gradients that come from a random gradient of the dense weight."""

    def __init__(self, memory: Memory, adapter: Adapter, multiple: int):
        self.adapter = adapter
        self.own, self.rank = adapter.A.shape[0], adapter.d.numel()
        width, out, dtype = adapter.A.shape[1], adapter.B.shape[0], adapter.d.dtype
        self.S = torch.randn(out, width, dtype=torch.float64)
        down, up, d = adapter.stacked()
        # Pads hold NaN: they must not be looked at.
        pads = padded(self.rank, multiple) - self.rank
        self.dAp = memory.read(_with_pads((up * d).T @ self.S, pads).to(wide(dtype)))
        self.dBt = memory.read(_with_pads(down @ self.S.T, pads).to(wide(dtype)))  # by columns
        self.inputs = adapter.map(memory.read)
        self.dA = memory.written(adapter.A.shape, dtype)
        self.dB = memory.written(adapter.B.shape, dtype)
        self.dd = memory.written(adapter.d.shape, dtype)

    def layer(self, kernels):
        inputs = [self.inputs.B, self.inputs.B_pool, self.inputs.d]
        tensors = [self.dAp, self.dBt, *inputs, self.dA, self.dB, self.dd]
        width, out = self.adapter.A.shape[1], self.adapter.B.shape[0]
        return kernels.PackBackwardLayer(
            *map(address, tensors), width, out, self.own, self.rank - self.own
        )

    def assert_right(self) -> None:
        expected = oracle.adapter_grads(self.S, self.adapter)
        for field, actual in (("A", self.dA), ("B", self.dB)):
            assert_close(actual, expected[field])
        # dd is a sum over `out` of terms that cancel.
        up, T = self.adapter.stacked()[1], self.dBt[: self.rank].T.double()
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


def pool_outputs(memory: Memory, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """dA_pool (pooled, in), dB_pool (out, pooled) by columns."""
    pooled = adapter.d.numel() - adapter.A.shape[0]
    dtype = adapter.d.dtype
    return (
        memory.written((pooled, adapter.A.shape[1]), dtype),
        memory.written((pooled, adapter.B.shape[0]), dtype),
    )


def workspace(kernels, memory: Memory, layers: list[Layer]) -> Tensor:
    first = layers[0]
    size = kernels.pack_backward_workspace(
        len(layers),
        first.adapter.B.shape[0],
        first.own,
        first.rank - first.own,
        dtype_of(kernels, first.dd.dtype),
    )
    return memory.workspace(size)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rank", RANKS)
def test_one_layer(kernels, rank, dtype):
    for size in SIZES:
        for multiple, offset in ((16, 0), (16, 1), (1, 0)):
            memory = Memory(offset)
            layer = Layer(memory, random_adapter(*RANKS[rank], size, dtype), multiple)
            dA_pool, dB_pool = pool_outputs(memory, layer.adapter)
            call = (
                layer.layer(kernels),
                address(dA_pool),
                address(dB_pool),
                address(workspace(kernels, memory, [layer])),
                dtype_of(kernels, dtype),
            )
            run(kernels, memory, lambda call=call: kernels.pack_backward(*call))
            layer.assert_right()
            expected = oracle.adapter_grads(layer.S, layer.adapter)
            assert_close(dA_pool, expected["A_pool"])
            assert_close(dB_pool.T, expected["B_pool"])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rank", RANKS)
def test_the_layers_of_a_group(kernels, rank, dtype):
    own, pooled = RANKS[rank]
    for size, count in (((33, 17), 1), ((16, 131), 3), ((1030, 9), 5)):
        memory = Memory()
        first = random_adapter(own, pooled, size, dtype)
        adapters = [random_adapter(own, pooled, size, dtype) for _ in range(count)]
        layers = [
            Layer(memory, Adapter(a.A, first.A_pool, a.B, first.B_pool, a.d), 16) for a in adapters
        ]
        dA_pool, dB_pool = pool_outputs(memory, first)
        call = (
            [layer.layer(kernels) for layer in layers],
            address(dA_pool),
            address(dB_pool),
            address(workspace(kernels, memory, layers)),
            dtype_of(kernels, dtype),
        )
        run(kernels, memory, lambda call=call: kernels.pack_layers_backward(*call))
        expected = [oracle.adapter_grads(layer.S, layer.adapter) for layer in layers]
        for layer in layers:
            layer.assert_right()
        # Sums may cancel: the bound is that of the terms.
        for actual, field in ((dA_pool, "A_pool"), (dB_pool.T, "B_pool")):
            total = sum(grads[field] for grads in expected)
            terms = sum(grads[field].abs() for grads in expected)
            scale = terms.max() if terms.numel() else 0
            slack = ((2 + 2 * count) * epsilon(wide(dtype)) + ORACLE) * scale
            least = 2.0**-24 * (dtype == torch.float16)
            assert_within(actual, total, total.abs() * epsilon(dtype) + slack + least)


def test_the_pytorch_kernel_agrees(kernels):
    memory = Memory()
    layer = Layer(memory, random_adapter(7, 32, (64, 300), torch.float32), 16)
    dA_pool, dB_pool = pool_outputs(memory, layer.adapter)
    call = (
        layer.layer(kernels),
        address(dA_pool),
        address(dB_pool),
        address(workspace(kernels, memory, [layer])),
        kernels.DType.float32,
    )
    run(kernels, memory, lambda: kernels.pack_backward(*call))
    adapter = layer.adapter
    outputs = reference.pack_backward(layer.dAp, layer.dBt.T, adapter.B, adapter.B_pool, adapter.d)
    ours = (layer.dA, dA_pool, layer.dB, dB_pool.T, layer.dd)
    for name_, mine, theirs in zip(("A", "A_pool", "B", "B_pool"), ours, outputs, strict=False):
        assert torch.equal(mine, theirs), name_
    assert [t.stride() for t in ours] == [t.stride() for t in outputs]
    torch.testing.assert_close(ours[4], outputs[4], rtol=1e-5, atol=1e-5)


def test_no_layers(kernels):
    launches = kernels.counts()["launches"]
    kernels.pack_layers_backward([], 0, 0, 0, kernels.DType.float32)
    assert kernels.counts()["launches"] == launches
