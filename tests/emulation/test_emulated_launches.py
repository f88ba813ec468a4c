"""What the stand-alone check leaves: launches, refusals, and the bits of PyTorch's kernels.

Values, margins, crooked addresses and the order of execution are the check's, which the sanitizers
and the mutants run as well.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rasa_ext import ops
from tests.helpers.operators import draw_adapter
from tests.helpers.oracle import Adapter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def dtype_of(kernels: ModuleType, dtype: torch.dtype):
    return getattr(kernels.DType, str(dtype).removeprefix("torch."))


def launches(kernels: ModuleType, call: Callable[[], None]) -> int:
    before = kernels.launches()
    call()
    return kernels.launches() - before


def packing(kernels: ModuleType, adapter: Adapter, dtype: torch.dtype, Rp: int):
    """A layer for ``kernels.pack``, and where its pack will be. B and B_pool lie by ranks."""
    (own, width), out = adapter.A.shape, adapter.B.shape[0]
    Ap, Bp = (torch.empty(Rp, size, dtype=dtype) for size in (width, out))
    tensors = (adapter.A, adapter.A_pool, adapter.B, adapter.B_pool, adapter.d, Ap, Bp)
    sizes = width, out, own, adapter.d.numel() - own, Rp
    return kernels.PackLayer(*map(address, tensors), *sizes), Ap, Bp


def backward(kernels: ModuleType, adapters: list[Adapter], dAp: Tensor, dBp: Tensor) -> tuple:
    """The arguments of ``kernels.pack_backward``, and the gradients that it will write."""
    first = adapters[0]
    (own, width), out, pooled = first.A.shape, first.B.shape[0], first.A_pool.shape[0]
    layers, grads = [], []
    pool = torch.empty(pooled, width), torch.empty(pooled, out)
    for i, each in enumerate(adapters):
        found = torch.empty(own, width), torch.empty(own, out), torch.empty(own + pooled)
        tensors = (dAp[i], dBp[i], each.B, each.d, *found)
        layers.append(kernels.PackBackwardLayer(*map(address, tensors)))
        grads.append(found)
    rest = (first.B_pool, *pool)
    call = layers, *map(address, rest), width, out, own, pooled, kernels.DType.float32
    return call, grads, pool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("own", "pooled"), [(0, 8), (7, 32)])
def test_pack_gives_the_bits_of_the_pytorch_kernel(kernels, own, pooled, dtype):
    adapter = draw_adapter(40, 300, own, pooled)
    layer, *found = packing(kernels, adapter, dtype, 8 if own == 0 else 48)
    kernels.pack([layer], kernels.DType.float32, dtype_of(kernels, dtype))
    expected = ops.pack(*adapter, dtype, 8 if own == 0 else 16)
    assert all(map(torch.equal, found, expected))


def test_pack_backward_gives_the_bits_of_the_pytorch_kernel(kernels):
    """But for dd, a sum in another order."""
    adapter = draw_adapter(64, 300, 7, 32)
    dAp, dBp = torch.randn(1, 48, 64), torch.randn(1, 48, 300)
    call, ((dA, dB, dd),), (dA_pool, dB_pool) = backward(kernels, [adapter], dAp, dBp)
    kernels.pack_backward(*call)
    *expected, dots = ops.pack_backward(dAp[0], dBp[0], adapter.B, adapter.B_pool, adapter.d)
    assert all(map(torch.equal, (dA, dA_pool, dB.t(), dB_pool.t()), expected))
    torch.testing.assert_close(dd, dots, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", ["none", 1, 3, "by value", "from a table"])
def test_one_launch_for_all_layers(kernels, count):
    most = kernels.layers_by_value
    count = {"none": 0, "by value": most, "from a table": most + 1}.get(count, count)
    adapters = [draw_adapter(9, 5, 2, 1) for _ in range(count)]
    made = [packing(kernels, each, torch.bfloat16, 3) for each in adapters]
    types = kernels.DType.float32, kernels.DType.bfloat16
    layers = [layer for layer, *_ in made]
    assert launches(kernels, lambda: kernels.pack(layers, *types)) == (count > 0)
    if count == 0:
        empty = kernels.PackLayer(*[0] * 7, 4, 4, 0, 0, 0)
        assert launches(kernels, lambda: kernels.pack([empty], *types)) == 0
        call = [], 0, 0, 0, 4, 4, 1, 1, kernels.DType.float32
    else:
        grads = torch.randn(count, 3, 9), torch.randn(count, 3, 5)
        call, *_alive = backward(kernels, adapters, *grads)
    assert launches(kernels, lambda: kernels.pack_backward(*call)) == (count > 0)


@pytest.mark.parametrize("tokens", [1, 16])
def test_two_launches_of_decode_whatever_the_size(kernels, tokens):
    x, Ap, Bp = torch.randn(tokens, 2048), torch.randn(16, 2048), torch.randn(16, 32)
    y, space = torch.zeros(tokens, 32), torch.empty(kernels.decode_workspace(tokens, 2048, 16))
    call = *map(address, (x, Ap, Bp)), 0, address(y), address(space), tokens, 2048, 32, 16
    assert launches(kernels, lambda: kernels.decode(*call, kernels.DType.float32)) == 2
    torch.testing.assert_close(y, x @ Ap.t() @ Bp, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("words", "count"), [(0, 0), (510, 1), (511, 2), (1021, 3)])
def test_a_launch_takes_as_much_as_its_parameters(kernels, words, count):
    to = torch.empty(max(words, 1), dtype=torch.int64)
    assert launches(kernels, lambda: kernels.write_table([7] * words, address(to))) == count


def test_refusals(kernels):
    single, double = kernels.DType.float32, kernels.DType.float64
    with pytest.raises(ValueError, match="decode_fits"):
        kernels.decode(0, 0, 0, 0, 0, 0, 1, 8, 8, 12289, single)
    layer, *_ = packing(kernels, draw_adapter(8, 8, 3, 2), torch.float32, 16)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, got float64"):
        kernels.pack([layer], double, single)
