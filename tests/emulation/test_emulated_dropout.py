"""dropout: the words of Philox, the mask as bits, and both directions against float64."""

from __future__ import annotations

import pytest
import torch
from emulated import DTYPES, Memory, address, assert_within, dtype_of, epsilon, name, run

# Philox 4x32-10 of key 0 and counter 0, from the known answers of Random123.
KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
WIDTHS = (33, 64)


def unpacked(mask: torch.Tensor, count: int) -> torch.Tensor:
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(-1)[:count].bool()


def draw_mask(kernels, count: int, seed: int, offset: int, p: float) -> torch.Tensor:
    x = torch.zeros(count)
    mask = torch.empty(kernels.dropout_mask_bytes(count), dtype=torch.uint8)
    x_drop = torch.empty_like(x)
    addresses = address(x), address(x_drop), address(mask)
    kernels.dropout(*addresses, count, seed, offset, p, kernels.DType.float32)
    return unpacked(mask, count)


@pytest.mark.parametrize("index", range(4))
def test_philox_gives_its_known_answers(kernels, index):
    """A word is kept at its own threshold, and dropped at the next."""
    assert draw_mask(kernels, 4, 0, 0, KNOWN[index] / 2**32)[index]
    assert not draw_mask(kernels, 4, 0, 0, (KNOWN[index] + 1) / 2**32)[index]


def test_offset_moves_along_one_stream(kernels):
    whole = draw_mask(kernels, 4000, 11, 5, 0.4)
    assert kernels.dropout_draws(400) == 100
    assert torch.equal(draw_mask(kernels, 3600, 11, 105, 0.4), whole[400:])
    assert not torch.equal(draw_mask(kernels, 4000, 12, 5, 0.4), whole)
    high = draw_mask(kernels, 4000, 11 + 2**32, 5, 0.4)
    assert not torch.equal(high, whole)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_of_dropped_elements(kernels, p):
    count = 40_000
    dropped = count - draw_mask(kernels, count, 3, 0, p).sum().item()
    assert abs(dropped - count * p) < 5 * (count * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_both_directions(kernels, p, tokens, dtype):
    seed, offset = 2**63 + 12345, 77
    for width in WIDTHS:
        for misplaced in (0, 1):
            n = tokens * width
            memory = Memory(misplaced)
            x = memory.read(torch.randn(tokens, width).to(dtype))
            x_drop = memory.written(x.shape, dtype)
            mask = memory.workspace(kernels.dropout_mask_bytes(n))
            draw = (n, seed, offset, p, dtype_of(kernels, dtype))
            call = (address(x), address(x_drop), address(mask), *draw)
            run(kernels, memory, lambda call=call: kernels.dropout(*call))
            kept = unpacked(mask, n).view(x.shape)
            scale = 1 / (1 - p) if p < 1 else 0.0
            bound = 2 * epsilon(dtype) + 2**-23 * (dtype != torch.float64)
            expected = torch.where(kept, x.double() * scale, 0.0)
            assert_within(x_drop, expected, expected.abs() * bound + 2.0**-24 * scale)
            assert not x_drop[~kept].any()
            if p == 0:
                assert kept.all()

            base = torch.randn(tokens, width).to(dtype)
            memory = Memory(misplaced)
            grad = memory.read(torch.randn(tokens, width).to(dtype))
            dx = memory.written(x.shape, dtype)
            total = base.double() + torch.where(kept, grad.double() * scale, 0.0)
            terms = base.double().abs() + grad.double().abs() * scale
            for saved in (address(mask), 0):  # read, or drawn again
                call = (address(grad), address(dx), saved, *draw)
                run(
                    kernels,
                    memory,
                    lambda call=call: kernels.dropout_backward(*call),
                    before=lambda dx=dx, base=base: dx.copy_(base),
                )
                slack = terms * 2.0**-22 + 2.0**-24
                assert_within(dx, total, total.abs() * epsilon(dtype) + slack)


def test_a_dropped_element_is_zero_whatever_it_was(kernels):
    x = torch.full((64,), float("nan"))
    out = torch.empty_like(x)
    kernels.dropout(address(x), address(out), 0, 64, 1, 0, 0.5, kernels.DType.float32)
    kept = draw_mask(kernels, 64, 1, 0, 0.5)
    assert torch.equal(out.isnan(), kept)
    assert not out[~kept].any()
