"""Dropout of the adapter's input: the operator that draws it, and the functions that apply a mask.

A mask is applied to the bits of the elements, as integers of their width: a tenth of the time of
``torch.where`` on a CPU, and zero for whatever is dropped, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.library import operator

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _results(noise: Tensor, x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Shape mask and x_dropped whatever the noise is: the compiled kernel takes two words of it."""
    return x.new_empty(-(-x.numel() // 8), dtype=torch.uint8), x.new_empty(x.shape)


@operator(
    "dropout(Tensor noise, Tensor x, float p) -> (Tensor mask, Tensor x_dropped)", fake=_results
)
def dropout(noise: Tensor, x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Draw which elements of x (M, in) dropout keeps: a mask of bits, and x where they are set.

    The mask is uint8 (ceil(M in / 8),), for the backward: bit e % 8 of byte e // 8 is element e's,
    counted along x's rows, kept with the probability 1 - p in steps of 2^-16; bits behind the last
    element mean nothing. x_dropped (M, in) is x there and 0 elsewhere, unscaled, for the forward.
    ``noise`` is int64 of uniformly distributed bits, as many as ``heuristics.noise_words`` says.
    Here element e is kept where the e-th 16 bits of the noise are at least p * 2^16.

    Words of 16 bits are compared and packed eight at a time, which takes a tenth of the time in
    which the noise is drawn; ``bernoulli_`` alone takes five times as long as that.
    """
    if not 0 <= p < 1:
        raise ValueError(f"rasa_ext::dropout: p: expected a number in [0, 1), got {p}.")
    words = 2 * -(-x.numel() // 8)
    if noise.dtype != torch.int64 or noise.shape != (words,):
        raise ValueError(
            f"rasa_ext::dropout: noise: expected int64 of shape ({words},), got {noise.dtype} "
            f"of shape {tuple(noise.shape)}; draw ops.noise_words."
        )
    drawn = noise.view(torch.int16)  # uniform from -2^15 on
    ones = torch.ge(drawn, min(round(p * 2**16), 2**16 - 1) - 2**15, out=torch.empty_like(drawn))
    # The product's top byte gathers the lowest bits of all eight bytes.
    mask = (ones.to(torch.int8).view(torch.int64).mul_(0x0102040810204080) >> 56).to(torch.uint8)
    bits = ones.neg_()[: x.numel()].view(x.shape).to(_INTEGERS[x.dtype])  # all bits set, or none
    return mask, keep(x.contiguous(), bits)


def unpacked(mask: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give the mask in ``shape``, as integers of the width of ``like``: all bits set, or none."""
    # Every byte eight times, its k-th bit in the k-th of them, and that moved to the sign.
    spread = mask.to(torch.int64).mul_(0x0101010101010101)
    spread = spread.bitwise_and_(0x8040201008040201 - 2**64).add_(0x7F7F7F7F7F7F7F7F)
    bits = spread.view(torch.int8).bitwise_right_shift_(7)[: shape[0] * shape[1]]
    return bits.to(_INTEGERS[like.dtype]).view(shape)


def integers(x: Tensor) -> Tensor:
    """View x as integers: its memory is shared."""
    return x.view(_INTEGERS[x.dtype])


def keep(x: Tensor, bits: Tensor) -> Tensor:
    """Give x where ``bits``, from ``unpacked``, and 0 elsewhere."""
    return torch.bitwise_and(integers(x), bits).view(x.dtype)


def project(x: Tensor, Ap: Tensor, x_dropped: Tensor | None, scale: float) -> Tensor:
    """Compute U = X Ap^T (M, Rp), from what dropout has left of X where that is given."""
    if x_dropped is None:
        return torch.mm(x, Ap.t())
    return torch.mm(x_dropped, Ap.t()).mul_(scale)
