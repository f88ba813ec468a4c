"""Guarded memory, random adapters and bounds for the tests of the emulated kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

from tests.helpers.oracle import Adapter

HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*HALF_AND_SINGLE, torch.float64]
PAIRS = [(p, t) for p in HALF_AND_SINGLE for t in HALF_AND_SINGLE] + [(torch.float64,) * 2]

# Effective rank: own and pooled.
RANKS = {1: (1, 0), 7: (7, 0), 8: (7, 1), 39: (7, 32), 48: (16, 32), 156: (28, 128)}
SIZES = [(64, 40), (33, 17), (16, 131), (45, 24)]  # in, out

SCHEDULES = (1, 2, 3)
_MARGIN = 32  # elements


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(kernels: ModuleType, dtype: torch.dtype):
    return getattr(kernels.DType, name(dtype))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Memory:
    """Tensors with margins: NaN around what is read, and bytes around what is written that must
    stay. ``offset`` moves every tensor by so many elements away from 16 bytes. What is handed out
    lives as long as this does, so that an address alone is safe to keep."""

    def __init__(self, offset: int = 0):
        self.offset = offset
        self.margins: list[tuple[Tensor, Tensor]] = []
        self.outputs: list[Tensor] = []

    def read(self, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        tensor = self._guarded(values.shape, values.dtype)
        tensor.copy_(values)
        return tensor

    def written(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        tensor = self._guarded(tuple(shape), dtype)
        self.outputs.append(tensor)
        return tensor

    def workspace(self, size: int) -> Tensor:
        """Bytes at a multiple of 16, whatever the offset."""
        whole = torch.full((size + 2 * _MARGIN,), 0xFF, dtype=torch.uint8)
        self.margins += [
            (edge, edge.clone()) for edge in (whole[:_MARGIN], whole[_MARGIN + size :])
        ]
        return whole[_MARGIN : _MARGIN + size]

    def _guarded(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size, first = torch.Size(shape).numel(), _MARGIN + self.offset
        whole = torch.full((first + size + _MARGIN,), float("nan"), dtype=dtype)
        for edge in (whole[:first], whole[first + size :]):
            self.margins.append((edge.view(torch.uint8), edge.view(torch.uint8).clone()))
        return whole[first : first + size].view(shape)

    def assert_margins(self) -> None:
        for edge, before in self.margins:
            assert torch.equal(edge, before), "something was written beside a tensor"


def run(
    kernels: ModuleType,
    memory: Memory,
    call: Callable[[], None],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Runs ``call`` under several schedules over poisoned outputs, which must agree bit for bit.

    ``before`` sets outputs that are also read.
    """
    first: list[Tensor] = []
    for seed in SCHEDULES:
        for output in memory.outputs:
            output.fill_(float("nan") if output.is_floating_point() else 0xA5)
        before()
        kernels.set_schedule(seed)
        call()
        memory.assert_margins()
        found = [output.reshape(-1).view(torch.uint8).clone() for output in memory.outputs]
        first = first or found
        assert all(map(torch.equal, first, found)), "the result depends on the order of execution"


def random_adapter(own: int, pooled: int, size: tuple[int, int], dtype: torch.dtype) -> Adapter:
    """A of unit rows, B of unit entries, d about 1; no pool where ``pooled`` is 0."""
    width, out = size
    A = torch.randn(own + pooled, width, dtype=torch.float64) * width**-0.5
    B = torch.randn(out, own + pooled, dtype=torch.float64)
    d = 1 + torch.randn(own + pooled, dtype=torch.float64) / 3
    pool = (A[own:], B[:, own:]) if pooled else (None, None)
    adapter = Adapter(A[:own], pool[0], B[:, :own], pool[1], d)
    return adapter.map(lambda t: t.to(dtype).contiguous())


def by_ranks(adapter: Adapter) -> Adapter:
    """With B and B_pool as the kernels read them: a row for each rank."""
    pool = None if adapter.B_pool is None else adapter.B_pool.T
    return Adapter(adapter.A, adapter.A_pool, adapter.B.T, pool, adapter.d)


def padded(rank: int, multiple: int) -> int:
    return (rank + multiple - 1) // multiple * multiple


def epsilon(dtype: torch.dtype) -> float:
    """The relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """|actual - expected| <= bound, elementwise; NaN fails."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"largest error {error.max().item():.3e}"


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item() if error.numel() else 0.0
