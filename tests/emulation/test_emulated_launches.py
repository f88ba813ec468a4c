"""Launch counts and refused calls of the emulated kernels.

The stand-alone check, which sanitizers and mutants also run, tests values, writes out of bounds,
misaligned addresses and the order of execution. tests/ops compares with the PyTorch kernels.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import passes
from tests.helpers.operators import draw_adapter
from tests.helpers.oracle import Adapter


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def dtype_of(kernels: ModuleType, dtype: torch.dtype):
    return getattr(kernels.DType, str(dtype).removeprefix("torch."))


def launches(kernels: ModuleType, call: Callable[[], None]) -> int:
    before = kernels.launches()
    call()
    return kernels.launches() - before


def packing(
    kernels: ModuleType, adapters: list[Adapter], sizes: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple, tuple[Tensor, Tensor]]:
    """Return the arguments of ``kernels.pack``, and the packs that it will write.

    ``sizes`` are in, out, private ranks, pool ranks and Rp. The adapters share the first
    one's pool.
    """
    width, out, *_, Rp = sizes
    made = tuple(torch.empty(len(adapters), Rp, size, dtype=dtype) for size in (width, out))
    layers = [kernels.PackLayer(*map(address, (each.A, each.B, each.d))) for each in adapters]
    pools = [address(t) for each in adapters[:1] for t in (each.A_pool, each.B_pool)] or [0, 0]
    types = kernels.DType.float32, dtype_of(kernels, dtype)
    return (layers, *pools, *map(address, made), *sizes, *types), made


def backward(
    kernels: ModuleType, adapters: list[Adapter], sizes: tuple[int, ...], dAp: Tensor, dBp: Tensor
) -> tuple[tuple, tuple[Tensor, ...]]:
    """Return the arguments of ``kernels.pack_backward``, and the gradients that it will write."""
    width, out, own, pooled, _ = sizes
    count = len(adapters)
    shapes = (count, own, width), (pooled, width), (count, out, own), (out, pooled)
    found = tuple(map(torch.empty, (*shapes, (count, own + pooled))))
    layers = [
        kernels.PackBackwardLayer(*map(address, (*grads, each.B, each.d)))
        for each, *grads in zip(adapters, dAp, dBp, strict=True)
    ]
    pool = address(adapters[0].B_pool) if adapters else 0
    return (layers, pool, *map(address, found), *sizes[:4], kernels.DType.float32), found


GROUPS = [(count, (9, 5, 2, 1, 3)) for count in (0, 1, 3, "by value", "from a table")]


@pytest.mark.parametrize(("count", "sizes"), [*GROUPS, (1, (4, 4, 0, 0, 0))])
def test_one_launch_for_all_layers_and_none_over_nothing(kernels, count, sizes):
    most, (width, out, *_, Rp) = kernels.layers_by_value, sizes
    count = {"by value": most, "from a table": most + 1}.get(count, count)
    group = [draw_adapter(*sizes[:4]) for _ in range(count)]
    call, _alive = packing(kernels, group, sizes, torch.bfloat16)
    assert launches(kernels, lambda: kernels.pack(*call)) == (count * Rp > 0)
    grads = torch.randn(count, Rp, width), torch.randn(count, Rp, out)
    back, _alive_too = backward(kernels, group, sizes, *grads)
    assert launches(kernels, lambda: kernels.pack_backward(*back)) == (count * Rp > 0)


@pytest.mark.parametrize("tokens", [1, 16])
def test_two_launches_of_decode_whatever_the_size(kernels, tokens):
    x, Ap, Bp = torch.randn(tokens, 2048), torch.randn(16, 2048), torch.randn(16, 32)
    y, space = torch.zeros(tokens, 32), torch.empty(kernels.decode_workspace(tokens, 2048, 16))
    call = *map(address, (x, Ap, Bp)), 0, address(y), address(space), tokens, 2048, 32, 16
    assert launches(kernels, lambda: kernels.decode(*call, kernels.DType.float32)) == 2
    torch.testing.assert_close(y, x @ Ap.t() @ Bp, rtol=1e-4, atol=1e-2)


PRODUCTS = [
    (600, 48, True, False, 2),
    (600, 48, False, True, 2),
    (60, 48, False, True, 1),  # one group of tokens
    (600, 96, True, True, 2),
    (600, 112, True, True, 3),
]


@pytest.mark.parametrize(("tokens", "rank", "down", "grad", "count"), PRODUCTS)
def test_launches_of_skinny_products(kernels, tokens, rank, down, grad, count):
    S, P, Q = (torch.randn(n).bfloat16() for n in (tokens * 64, rank * 64, tokens * rank))
    D, C = torch.empty(tokens, rank).bfloat16(), torch.empty(rank, 64)
    space = torch.empty(kernels.skinny_workspace(tokens, 64, rank, down, grad) // 4)
    given = (P if down else None, D, Q if grad else None, C, space)
    places = [0 if each is None else address(each) for each in (S, *given)]
    sizes = tokens, 64, rank, kernels.DType.bfloat16
    assert launches(kernels, lambda: kernels.skinny(*places, *sizes)) == count


@pytest.mark.parametrize("blocks", [132, 264])
@pytest.mark.parametrize("tokens", [512, 4096, 8192, 100_000])
@pytest.mark.parametrize("features", [64, 1024, 4096, 14336])
def test_what_is_predicted_to_be_added_up(kernels, tokens, features, blocks, monkeypatch):
    """benchmarks/passes.py predicts the partial sums that the kernels write."""
    if blocks != 132:  # the default
        monkeypatch.setenv("RASA_EXT_SKINNY_BLOCKS", str(blocks))

    def space(rank: int, down: bool, grad: bool) -> int:
        return kernels.skinny_workspace(tokens, features, rank, down, grad) // (4 * rank)

    assert space(48, True, False) == tokens * passes.down_parts(tokens, features, blocks)
    groups = passes.grad_groups(tokens, features, 64, 128, blocks)
    assert space(48, False, True) == (groups > 1) * groups * features
    groups = passes.grad_groups(tokens, features, 32, 256, blocks)
    assert space(96, True, True) == tokens * -(-features // 256) + (groups > 1) * groups * features


@pytest.mark.parametrize(("words", "count"), [(0, 0), (510, 1), (511, 2), (1021, 3)])
def test_a_launch_takes_as_much_as_its_parameters(kernels, words, count):
    to = torch.empty(max(words, 1), dtype=torch.int64)
    assert launches(kernels, lambda: kernels.write_table([7] * words, address(to))) == count


def test_refusals(kernels):
    single, double = kernels.DType.float32, kernels.DType.float64
    with pytest.raises(ValueError, match="decode_fits"):
        kernels.decode(0, 0, 0, 0, 0, 0, 1, 8, 8, 12289, single)
    call, _ = packing(kernels, [draw_adapter(8, 8, 3, 2)], (8, 8, 3, 2, 16), torch.float32)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, got float64"):
        kernels.pack(*call[:-2], double, single)
