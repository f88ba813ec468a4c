"""Operators in cases where a GPU uses other kernels: real sizes, few tokens, pieces of buffers.

tests/ops and tests/nn/test_group.py test small sizes in every dtype, also on the device.
"""

import pytest
import torch

import rasa_ext
from rasa_ext import ops
from tests.gpu.steps import check_layer
from tests.helpers import linear_cases
from tests.helpers.adapters import excesses_of
from tests.helpers.cuda import assert_close
from tests.helpers.operators import draw_mask, floor, shifted

# Kernels of float16 are those of bfloat16 with another type, so a GPU alone runs both.
FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.gpu)
FLOATS = (torch.float32, torch.bfloat16, FLOAT16)


def test_every_operator_has_a_compiled_kernel(device):
    """Every operator has a compiled kernel, except those composed of torch's own kernels.

    Without one, an operator runs as PyTorch operations, and all other tests still pass.
    """
    namespace, key = ("rasa_ext", "CUDA") if device == "cuda" else ("rasa_ext_host", "CPU")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = ops.OPERATORS.keys() - ops.COMPOSED
    missing = [name for name in names if not has_kernel(f"{namespace}::{name}", key)]
    assert not missing, rasa_ext.cuda_status()


# (tokens, in, out) on a GPU, with several waves of tiles, and on the CPU.
SIZES = {
    "q": ((8192, 4096, 4096), (64, 32, 32)),
    "gate": ((4096, 4096, 14336), (32, 32, 112)),
    "down": ((4096, 14336, 4096), (32, 112, 32)),
    "k": ((8192, 4096, 1024), (64, 32, 8)),
    "odd": ((4093, 4095, 1001), (61, 31, 13)),
    "narrow": ((4100, 4100, 12), (60, 36, 12)),
}


@pytest.mark.parametrize("layer", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_of_a_large_model(layer, dtype, device):
    """Large layers are as exact as plain PyTorch at r = 8, k = 1 and 32 layers, so R = 39."""
    large, small = SIZES[layer]
    sizes, draws = (large, 1) if device == "cuda" else (small, 8)
    check_layer((*sizes, 7, 32), dtype, device, draws)


@pytest.mark.parametrize("tokens", [1, 16, 17])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_tokens(tokens, dtype, device):
    width, out = (4096, 4096) if device == "cuda" else (32, 24)
    check_layer((tokens, width, out, 7, 32), dtype, device, 8)
    check_layer((tokens, width - 3, out - 1, 7, 32), dtype, device, 8)


@pytest.mark.parametrize("place", range(7), ids=("x", "weight", "bias", "Ap", "Bp", "y", "U"))
@pytest.mark.parametrize("tokens", [3, 1030])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pieces_of_flat_buffers(tokens, place, dtype, device):
    """Outputs and gradients are right if a tensor starts 1, 2 or 4 elements into its memory."""
    tensors = linear_cases.draw((tokens, 64, 72, 16), dtype, device)
    expected = linear_cases.operators(*tensors)
    for offset in (1, 2, 4):
        moved = list(tensors)
        moved[place] = shifted(tensors[place], offset)
        found = linear_cases.operators(*moved)
        assert_close(list(found.values()), list(expected.values()), dtype)


# (tokens, in, out, ranks) of the skinny kernels, on a GPU and on the CPU: partial tiles in every
# dimension, both gradient products from one read or two, ranks equal to and below the kernel's.
SKINNY = (
    ((8192, 4096, 4096, 48), (1032, 64, 264, 48)),
    ((4093, 4096, 14336, 96), (1027, 64, 272, 96)),
    ((2049, 14336, 4096, 160), (1024, 288, 40, 160)),
    ((1025, 1056, 1032, 16), (1025, 96, 72, 16)),
)


def skinny_products(x, weight, bias, Ap, Bp, grad, U, *mask):
    """Compute the products of a linear without the base."""
    added, down = ops.low_rank_add(grad, x, Ap, Bp, *mask)
    grads = ops.low_rank_linear_backward(grad, x, None, U, Ap, Bp, True, True, True, *mask)
    return dict(zip(("added", "U", "dx_add", "dAp", "dBp"), (added, down, *grads), strict=True))


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("sizes", SKINNY, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16], ids=str)
def test_skinny_products(sizes, dtype, dropout, device, monkeypatch):
    """The kernels' errors are at most twice cuBLAS's, and repeated results are bit-identical."""
    tensors = linear_cases.draw(sizes[device != "cuda"], dtype, device)
    mask, kept = draw_mask(tensors[0], dropout)
    wide = linear_cases.formulas(*(t.double() for t in tensors), kept)
    if dropout:
        tensors[0][~kept] = torch.nan  # dropped elements must have no effect
    found, again = (skinny_products(*tensors, *mask) for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    monkeypatch.setenv("RASA_EXT_KERNELS", "cublas")
    reference = {name: wide[name] for name in found}
    plain = skinny_products(*tensors, *mask)
    assert not excesses_of(found, plain, reference, floor(dtype))[0]


# (tokens, rank): shared memory holds U of 8, 4, 1 or no tokens at once.
LARGE_RANKS = ((16, 1536), (9, 1536), (5, 3072), (3, 3072), (2, 12288), (1, 12288), (2, 12304))


def rank_by_rank(U, Bp):
    """Compute ``U Bp`` with a kernel's order of summation; a library's depends on the processor."""
    total = U.new_zeros((U.shape[0], Bp.shape[1]))
    for u, row in zip(U.unbind(1), Bp, strict=True):
        total.addcmul_(u[:, None], row)
    return total


@pytest.mark.parametrize(("tokens", "rank"), LARGE_RANKS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_tokens_of_a_large_rank(tokens, rank, dtype, device):
    sizes = (tokens, 1024, 1000, rank) if device == "cuda" else (tokens, 9, 6, rank)
    tensors = linear_cases.draw(sizes, dtype, device)
    x, weight, bias, Ap, Bp, base, _ = tensors
    wide = linear_cases.formulas(*(t.double() for t in tensors))
    y, U = ops.low_rank_linear(x, weight, bias, Ap, Bp)
    found = {"y": y, "U": U, "added": ops.low_rank_add(base, x, Ap, Bp)[0]}
    narrow = rank_by_rank(x @ Ap.T, Bp) if dtype == torch.float32 else (x @ Ap.T) @ Bp
    plain = {"y": x @ weight.T + narrow + bias, "U": x @ Ap.T, "added": base + narrow}
    expected = {name: wide[name] for name in found}
    assert not excesses_of(found, plain, expected, floor(dtype))[0]
