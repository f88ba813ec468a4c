"""decode against float64, with at most twice the error of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from emulated import (
    HALF_AND_SINGLE,
    RANKS,
    Memory,
    address,
    dtype_of,
    name,
    padded,
    random_adapter,
    rms,
    run,
)

from tests.helpers import oracle
from tests.helpers.oracle import Adapter

# (in, out), what the rank is padded to, and elements away from 16 bytes. A width of several parts
# is cut the same way whatever the rank, so that the largest goes without.
PADS = ((16, 0), (16, 1), (1, 0))
CASES = [(size, *pad) for size in ((64, 40), (33, 17)) for pad in PADS]
LONG = [((1544, 36), 16, 0), ((1544, 36), 1, 1), ((1051, 5), 16, 0)]


def decode(kernels, memory, x, Ap, Bp, base, wants_U=True):
    """y = base + (x Ap^T) Bp and U = x Ap^T."""
    tokens, (rank, width) = x.shape[0], Ap.shape
    inputs = [memory.read(tensor) for tensor in (x, Ap, Bp)]
    U = memory.written((tokens, rank), x.dtype) if wants_U else None
    y = memory.written(base.shape, x.dtype)
    workspace = memory.workspace(kernels.decode_workspace(tokens, width, rank))
    call = (
        *map(address, inputs),
        address(U),
        address(y),
        address(workspace),
        tokens,
        width,
        Bp.shape[1],
        rank,
        dtype_of(kernels, x.dtype),
    )
    run(kernels, memory, lambda: kernels.decode(*call), before=lambda: y.copy_(base))
    return y, U


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 16])
def test_decode(kernels, tokens, rank, dtype):
    errors, plain = [], []
    for size, multiple, offset in CASES + LONG * (rank <= 48):
        adapter = random_adapter(*RANKS[rank], size, torch.float64)
        down, up = oracle.lora_matrices(adapter, padded(rank, multiple))
        Ap, Bp = down.to(dtype), up.T.to(dtype)
        x = torch.randn(tokens, size[0]).to(dtype)
        base = torch.randn(tokens, size[1]).to(dtype)
        y, U = decode(kernels, Memory(offset), x, Ap, Bp, base, wants_U=offset == 0)
        # The pack as an adapter of its own, whose d is 1.
        ones = torch.ones(Ap.shape[0], dtype=dtype)
        pack = Adapter(Ap, None, Bp.T, None, ones)
        zero = torch.zeros(size[1], size[0])
        expected = base.double() + oracle.linear(x, zero, None, pack)
        errors.append(y.double() - expected)
        plain.append(torch.addmm(base, x @ Ap.T, Bp).double() - expected)
        if U is not None:
            errors.append(U.double() - x.double() @ Ap.double().T)
            plain.append((x @ Ap.T).double() - x.double() @ Ap.double().T)
    ours, theirs = (torch.cat([e.reshape(-1) for e in each]) for each in (errors, plain))
    assert not ours.isnan().any()
    assert rms(ours) <= 2 * rms(theirs)
    if tokens:
        assert ours.abs().max() <= 4 * theirs.abs().max()


@pytest.mark.parametrize("tokens", [17, 64])
def test_more_tokens_are_left_to_the_gemm(kernels, tokens):
    assert not kernels.decode_fits(tokens, 48, kernels.DType.bfloat16)
    assert kernels.decode_fits(16, 48, kernels.DType.bfloat16)


def test_float64_is_left_to_the_gemm(kernels):
    assert not kernels.decode_fits(1, 16, kernels.DType.float64)


def test_a_rank_beyond_shared_memory_is_refused(kernels):
    assert not kernels.decode_fits(1, 12289, kernels.DType.float32)
    with pytest.raises(ValueError, match="decode_fits"):
        kernels.decode(0, 0, 0, 0, 0, 0, 1, 8, 8, 12289, kernels.DType.float32)


@pytest.mark.parametrize("tokens", [1, 16])
def test_two_launches_whatever_the_size(kernels, tokens):
    x, Ap, Bp = torch.randn(tokens, 2048), torch.randn(16, 2048), torch.randn(16, 32)
    launches = kernels.counts()["launches"]
    decode(kernels, Memory(), x, Ap, Bp, torch.zeros(tokens, 32))
    assert kernels.counts()["launches"] == launches + 2 * 3  # under three schedules


def test_no_rank_leaves_the_output_alone(kernels):
    y = torch.randn(3, 4)
    before = y.clone()
    kernels.decode(0, 0, 0, 0, y.data_ptr(), 0, 3, 8, 4, 0, kernels.DType.float32)
    assert torch.equal(y, before)
