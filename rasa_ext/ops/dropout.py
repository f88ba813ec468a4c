"""Dropout of the adapter's input: an operator that draws a mask, and functions that apply it.

A mask is applied to elements as integers, bit by bit. On a CPU this takes a tenth of the time of
``torch.where``, and every dropped element becomes zero, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.heuristics import ranks_first
from rasa_ext.ops.library import operator

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _mask(noise: Tensor, x: Tensor, p: float) -> Tensor:
    """Shape a mask for noise of any length: the compiled kernel takes two words."""
    return x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)


@operator("dropout(Tensor noise, Tensor x, float p) -> Tensor mask", fake=_mask)
def dropout(noise: Tensor, x: Tensor, p: float) -> Tensor:
    """Draw a dropout mask for x (M, in), of which only the shape is read.

    The mask is uint8 (ceil(M in / 8),). Bit e % 8 of byte e // 8 belongs to element e, counted
    along x's rows. It is set with probability 1 - p, in steps of 2^-16. Bits after the last element
    mean nothing. ``noise`` is ``heuristics.noise_words`` int64 of uniform bits. This kernel keeps
    element e if the e-th 16 bits of the noise are at least p * 2^16.

    Words of 16 bits are compared and packed eight at a time. This takes a tenth of the time of
    drawing the noise; ``bernoulli_`` alone takes five times as long as drawing it.
    """
    if not 0 <= p < 1:
        raise ValueError(f"rasa_ext::dropout: p: expected a number in [0, 1), got {p}.")
    words = 2 * -(-x.numel() // 8)
    if noise.dtype != torch.int64 or noise.shape != (words,):
        raise ValueError(
            f"rasa_ext::dropout: noise: expected int64 of shape ({words},), got {noise.dtype} "
            f"of shape {tuple(noise.shape)}; draw ops.noise_words."
        )
    drawn = noise.view(torch.int16)  # uniform, starting at -2^15
    ones = torch.ge(drawn, min(round(p * 2**16), 2**16 - 1) - 2**15, out=torch.empty_like(drawn))
    # The product's top byte gathers the lowest bits of all eight bytes.
    return (ones.to(torch.int8).view(torch.int64).mul_(0x0102040810204080) >> 56).to(torch.uint8)


def unpacked(mask: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mask in ``shape``, as integers as wide as ``like`` with all bits set or none."""
    # Repeat every byte eight times; in copy k, shift bit k to the sign.
    spread = mask.to(torch.int64).mul_(0x0101010101010101)
    spread = spread.bitwise_and_(0x8040201008040201 - 2**64).add_(0x7F7F7F7F7F7F7F7F)
    bits = spread.view(torch.int8).bitwise_right_shift_(7)[: shape[0] * shape[1]]
    return bits.to(_INTEGERS[like.dtype]).view(shape)


def integers(x: Tensor) -> Tensor:
    """View x as integers, sharing memory."""
    return x.view(_INTEGERS[x.dtype])


def keep(x: Tensor, bits: Tensor) -> Tensor:
    """Return x where ``bits`` (from ``unpacked``) are set, and 0 elsewhere."""
    return torch.bitwise_and(integers(x), bits).view(x.dtype)


def project(x: Tensor, Ap: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute U = X Ap^T (M, Rp), from ``scale`` times the masked X if dropout is used."""
    source = x if mask is None else keep(x, unpacked(mask, x, (x.shape[0], x.shape[1])))
    U = torch.mm(Ap, source.t()).t() if ranks_first(x) else torch.mm(source, Ap.t())
    return U if mask is None else U.mul_(scale)
