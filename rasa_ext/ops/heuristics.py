"""Choices that are made by device and dtype, each a function with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.library import COMPILED


def adapter_first(device_type: str, dtype: torch.dtype) -> bool:
    """Decide whether the adapter's product comes first and the base's GEMM accumulates into it.

    The large GEMM hides the accumulate and the sum is rounded once, so that the order is also the
    more exact one in low precision. CPUs are the exception there: their half-precision GEMMs add
    to an existing output in a pass of its own, which costs least on the adapter's narrow product.
    """
    return device_type != "cpu" or dtype in (torch.float32, torch.float64)


def pool_in_packs(tokens: int, pooled: int) -> bool:
    """Decide whether a stack of layers packs the pool into every layer, or reads one pool.

    A pool of its own costs a layer of n to n features another pass over its tokens: 3 M n elements
    read and written in the forward and 5 M n in the backward. In the packs it costs a copy for
    each layer, with its diagonal folded in: 4 P n elements to write and read, twice, and 8 P n for
    the copy's gradients in float32. So a copy is cheaper from two tokens a pooled rank on, by
    count of bytes and not by measurement.
    """
    return tokens > 2 * pooled


def rank_multiple(device_type: str, dtype: torch.dtype, rank: int, tokens: int = 2048) -> int:
    """Choose the multiple to which a pack's rank is padded with zeros.

    On a GPU, half-precision GEMMs whose inner width is odd or only 8-aligned fall off the tensor
    cores' fast path. On a CPU, float32 GEMMs of 256 tokens and more that are ``rank`` wide take a
    third longer at 39 than at 40; bfloat16 ones do not care, and with few tokens the zeros cost
    more than they save. The other GEMMs pay for the pad, so that it is taken only where it adds an
    eighth or less.
    """
    if device_type == "cuda":
        return 16
    if dtype == torch.float32 and tokens >= 128 and 8 * (-rank % 8) <= rank:
        return 8
    return 1


def fuse_projections(x: Tensor) -> bool:
    """Decide whether layers that read one x (..., in), as q, k and v do, share a forward with grad.

    On a GPU with more than 16 tokens, where the gain is predicted and not measured: two products
    read x in place of six, dx is summed inside the products, and a step has 27 launches in place
    of 41. Up to 16 tokens each layer has two kernels of its own. On a CPU the gain is below a
    twentieth of what the official formula adds with the tokens of most steps.
    """
    return x.device.type == "cuda" and x.shape[:-1].numel() > 16


def noise_words(device_type: str, elements: int) -> int:
    """Count the int64 of noise that ``dropout`` takes for x of so many elements.

    The compiled kernel draws from a counter under two of them, a key and an offset. The PyTorch
    one takes 16 bits an element, a byte of the mask at a time.
    """
    if COMPILED and device_type == "cuda":
        return 2
    return 2 * -(-elements // 8)


def torch_differentiates(x: Tensor) -> bool:
    """Decide whether PyTorch differentiates the adapter of a forward with grad on x (..., in).

    On a CPU, where that saves 33 % (float32), 25 % (bfloat16) of the overhead at 16 tokens. On a
    GPU operators are fewer launches.
    """
    return x.is_cpu
