"""dropout: the words of Philox, the mask as bits, and what it leaves, bit for bit."""

from __future__ import annotations

import pytest
import torch
from emulated import DTYPES, Memory, address, dtype_of, name, run

# Philox 4x32-10 of key 0 and counter 0, from the known answers of Random123.
KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
HALVES = tuple(half for word in KNOWN for half in (word & 0xFFFF, word >> 16))


def unpacked(mask: torch.Tensor, count: int) -> torch.Tensor:
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(-1)[:count].bool()


def draw_mask(kernels, count: int, key: int, offset: int, p: float) -> torch.Tensor:
    memory = Memory()
    mask = memory.workspace(kernels.dropout_mask_bytes(count))
    kernels.dropout_mask(key, offset, address(mask), count, p)
    memory.assert_margins()
    return unpacked(mask, count)


@pytest.mark.parametrize("index", range(8))
def test_philox_gives_its_known_answers(kernels, index):
    """A word is kept at its own threshold, and dropped at the next."""
    assert draw_mask(kernels, 8, 0, 0, HALVES[index] / 2**16)[index]
    assert not draw_mask(kernels, 8, 0, 0, (HALVES[index] + 1) / 2**16)[index]


def test_offset_moves_along_one_stream(kernels):
    whole = draw_mask(kernels, 4000, 11, 5, 0.4)
    assert torch.equal(draw_mask(kernels, 3600, 11, 55, 0.4), whole[400:])
    assert not torch.equal(draw_mask(kernels, 4000, 12, 5, 0.4), whole)
    assert not torch.equal(draw_mask(kernels, 4000, 11 + 2**32, 5, 0.4), whole)
    assert not torch.equal(draw_mask(kernels, 4000, 11, 5 + 2**32, 0.4), whole)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 1 - 2**-20])
def test_share_of_dropped_elements(kernels, p):
    """At each place of a byte; next to 1 the last step of 2^-16 stays."""
    count = 80_000
    dropped = (~draw_mask(kernels, count, 2**63 + 3, 2**64 - 9, p)).view(-1, 8).sum(0)
    p = min(p, 1 - 2**-16)
    assert ((dropped - count / 8 * p).abs() <= 5 * (count / 8 * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33, 561, 2112, 4096])
def test_what_a_mask_leaves(kernels, count, dtype):
    """Also in place; a dropped element is 0 whatever it was, a kept one the same to the bit."""
    values = torch.randn(count).to(dtype)
    values[::5], values[::7] = float("nan"), float("inf")
    bits = torch.randint(256, (kernels.dropout_mask_bytes(count),), dtype=torch.uint8)
    expected = torch.where(unpacked(bits, count), values, torch.zeros((), dtype=dtype))
    for misplaced in (0, 1):
        memory = Memory(misplaced)
        x, kept = memory.read(values), memory.written(values.shape, dtype)
        mask = memory.workspace(bits.numel()).copy_(bits)
        tail = count, dtype_of(kernels, dtype)
        call = address(x), address(mask), address(kept), *tail
        run(kernels, memory, lambda call=call: kernels.dropout(*call))
        in_place = address(kept), address(mask), address(kept), *tail
        same = kept.clone()
        run(
            kernels,
            memory,
            lambda call=in_place: kernels.dropout(*call),
            before=lambda kept=kept: kept.copy_(values),
        )
        for found in (same, kept):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
