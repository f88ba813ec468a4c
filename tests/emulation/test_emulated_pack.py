"""Packs of one layer and of many against the zero-padded LoRA matrices of the oracle."""

from __future__ import annotations

import pytest
import torch
from emulated import (
    PAIRS,
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

from rasa_ext import ops
from tests.helpers import oracle
from tests.helpers.oracle import Adapter


class Packed:
    """One layer in guarded memory, with its outputs."""

    def __init__(self, memory: Memory, adapter: Adapter, dtype: torch.dtype, multiple: int):
        self.adapter = adapter
        self.rank = adapter.d.numel()
        self.width = padded(self.rank, multiple)
        self.inputs = by_ranks(adapter).map(memory.read)
        self.Ap = memory.written((self.width, adapter.A.shape[1]), dtype)
        self.Bp = memory.written((self.width, adapter.B.shape[0]), dtype)

    def layer(self, kernels):
        own = self.adapter.A.shape[0]
        tensors = [getattr(self.inputs, field) for field in ("A", "A_pool", "B", "B_pool", "d")]
        return kernels.PackLayer(
            *map(address, tensors),
            address(self.Ap),
            address(self.Bp),
            self.Ap.shape[1],
            self.Bp.shape[1],
            own,
            self.rank - own,
            self.width,
        )

    def assert_right(self) -> None:
        Ap, up = oracle.lora_matrices(self.adapter, self.width)
        Bp = up.T
        once = epsilon(self.Ap.dtype)
        least = 2.0**-24  # the step of float16 near 0
        assert_within(self.Ap, Ap, Ap.abs() * once + least * (self.Ap.dtype == torch.float16))
        product = epsilon(self.adapter.d.dtype) if self.adapter.d.dtype == torch.float64 else 2**-24
        bound = Bp.abs() * (once + product) * 1.001
        assert_within(self.Bp, Bp, bound + least * (self.Bp.dtype == torch.float16))
        assert not self.Ap[self.rank :].any()
        assert not self.Bp[self.rank :].any()


@pytest.mark.parametrize(("param", "dtype"), PAIRS, ids=lambda dtype: name(dtype))
@pytest.mark.parametrize("rank", RANKS)
def test_pack(kernels, rank, param, dtype):
    for size in SIZES:
        for multiple, offset in ((16, 0), (16, 1), (1, 0)):
            memory = Memory(offset)
            packed = Packed(memory, random_adapter(*RANKS[rank], size, param), dtype, multiple)
            layer = packed.layer(kernels)
            types = dtype_of(kernels, param), dtype_of(kernels, dtype)
            run(kernels, memory, lambda layer=layer, types=types: kernels.pack([layer], *types))
            packed.assert_right()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize(("own", "pooled"), [(0, 8), (7, 32)])
def test_pack_gives_the_bits_of_the_pytorch_kernel(kernels, own, pooled, dtype):
    memory = Memory()
    adapter = random_adapter(own, pooled, (40, 300), torch.float32)
    packed = Packed(memory, adapter, dtype, 16)
    types = dtype_of(kernels, torch.float32), dtype_of(kernels, dtype)
    run(kernels, memory, lambda: kernels.pack([packed.layer(kernels)], *types))
    A, A_pool, B, B_pool, d = adapter
    Ap, Bp = ops.pack(A, A_pool, B, B_pool, d, dtype, 16)
    assert torch.equal(packed.Ap, Ap)
    assert torch.equal(packed.Bp, Bp)


@pytest.mark.parametrize(("param", "dtype"), PAIRS, ids=lambda dtype: name(dtype))
def test_layers_of_different_shapes(kernels, param, dtype):
    memory = Memory()
    shapes = [(RANKS[39], (64, 40)), (RANKS[1], (5, 3)), (RANKS[156], (33, 131)), ((0, 6), (9, 80))]
    layers = [
        Packed(memory, random_adapter(*rank, size, param), dtype, 16) for rank, size in shapes
    ]
    table = [packed.layer(kernels) for packed in layers]
    launches = kernels.counts()["launches"]
    types = dtype_of(kernels, param), dtype_of(kernels, dtype)
    run(kernels, memory, lambda: kernels.pack(table, *types))
    assert kernels.counts()["launches"] == launches + 3  # one for each schedule
    for packed in layers:
        packed.assert_right()


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_layers_as_travel_by_value(kernels, more):
    """One launch either way; what is more than these is read from a table."""
    memory, count = Memory(), kernels.layers_by_value + more
    adapters = [random_adapter(2, 1, (9, 5), torch.float32) for _ in range(count)]
    layers = [Packed(memory, adapter, torch.bfloat16, 1) for adapter in adapters]
    table = [packed.layer(kernels) for packed in layers]
    launches = kernels.counts()["launches"]
    run(kernels, memory, lambda: kernels.pack(table, kernels.DType.float32, kernels.DType.bfloat16))
    assert kernels.counts()["launches"] == launches + 3
    for packed in layers:
        packed.assert_right()


def test_nothing_to_pack(kernels):
    launches = kernels.counts()["launches"]
    kernels.pack([], kernels.DType.float32, kernels.DType.bfloat16)
    kernels.pack([kernels.PackLayer(*[0] * 7, 4, 4, 0, 0, 0)], *[kernels.DType.float32] * 2)
    assert kernels.counts()["launches"] == launches


def test_float64_does_not_mix(kernels):
    memory = Memory()
    packed = Packed(memory, random_adapter(3, 2, (8, 8), torch.float64), torch.float32, 16)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, got float64"):
        kernels.pack([packed.layer(kernels)], kernels.DType.float64, kernels.DType.float32)
