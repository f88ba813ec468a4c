"""Choices by device and dtype: one function for each, with the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.library import COMPILED


def adapter_first(device_type: str, dtype: torch.dtype) -> bool:
    """Decide whether the adapter's product comes first and the base's GEMM accumulates into it.

    The large GEMM hides the accumulate, and the sum is rounded once, so this order is also more
    exact in low precision. CPUs are the exception: half-precision GEMMs there add to an existing
    output in a separate pass, which is cheapest on the adapter's narrow product.
    """
    return device_type != "cpu" or dtype in (torch.float32, torch.float64)


def pool_in_packs(tokens: int, pooled: int) -> bool:
    """Decide whether a stack of layers copies the pool into every pack, or reads one pool.

    Reading one pool costs a layer of n to n features another pass over the tokens: 3 M n elements
    read and written in the forward and 5 M n in the backward. A copy in the pack, with the
    diagonal folded in, costs 4 P n elements written and read, twice, and 8 P n for the copy's
    gradients in float32. So a copy is cheaper from two tokens per pooled rank on. This counts
    bytes; it is not measured.
    """
    return tokens > 2 * pooled


def rank_multiple(device_type: str, dtype: torch.dtype, rank: int, tokens: int = 2048) -> int:
    """Return the multiple to which a pack's rank is padded with zeros.

    On a GPU, half-precision GEMMs with an odd or only 8-aligned inner width miss the tensor cores'
    fast path. On a CPU, float32 GEMMs of 256 or more tokens take a third longer at rank 39 than at
    40. Padding does not help bfloat16 there, and with few tokens it costs more than it saves.
    Padding slows the other GEMMs, so it is used only if it adds an eighth or less.
    """
    if device_type == "cuda":
        return 16
    if dtype == torch.float32 and tokens >= 128 and 8 * (-rank % 8) <= rank:
        return 8
    return 1


def fuse_projections(x: Tensor) -> bool:
    """Decide whether layers that read one x (..., in), as q, k and v do, share a forward with grad.

    They do on a GPU with more than 16 tokens. The gain is predicted, not measured: two products
    read x instead of six, dx is summed inside the products, and a step has 27 launches instead of
    41. Up to 16 tokens, each layer runs two kernels. On a CPU, with the tokens of most steps, the
    gain is below a twentieth of the time that the official formula adds.
    """
    return x.device.type == "cuda" and x.shape[:-1].numel() > 16


def noise_words(device_type: str, elements: int) -> int:
    """Return how many int64 of noise ``dropout`` takes for x of so many elements.

    The compiled kernel takes two, the key and the offset of a counter. The PyTorch kernel takes 16
    bits for each element, rounded up to whole bytes of the mask.
    """
    if COMPILED and device_type == "cuda":
        return 2
    return 2 * -(-elements // 8)


def torch_differentiates(x: Tensor) -> bool:
    """Decide whether PyTorch differentiates the adapter of a forward with grad on x (..., in).

    It does on a CPU, which saves 33 % (float32) or 25 % (bfloat16) of the overhead at 16 tokens.
    On a GPU the operators need fewer launches.
    """
    return x.is_cpu
