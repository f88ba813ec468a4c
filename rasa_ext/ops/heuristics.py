"""Choices by device and dtype: one function for each, with the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops.library import COMPILED


def adapter_first(x: Tensor) -> bool:
    """Decide whether the adapter's product comes first and the base's GEMM accumulates into it.

    The large GEMM hides the accumulate, and the sum is rounded once, so this order is also more
    exact in low precision. CPUs are the exception: half-precision GEMMs there add to an existing
    output in a separate pass, which is cheapest on the adapter's narrow product.
    """
    return not x.is_cpu or x.dtype in (torch.float32, torch.float64)


def differentiates_products(x: Tensor) -> bool:
    """Decide whether PyTorch differentiates plain products of a pack, so that the pack is the port.

    On a CPU in float32 that is faster than an autograd function for every linear. In half precision
    the ports carry the pack's gradients in float32.
    """
    return x.is_cpu and x.dtype in (torch.float32, torch.float64)


def rank_multiple(device_type: str) -> int:
    """Return the multiple to which a pack's rank is padded with zeros.

    On a GPU, half-precision GEMMs with an odd or only 8-aligned inner width miss the tensor cores'
    fast path.
    """
    return 16 if device_type == "cuda" else 1


def ranks_first(x: Tensor) -> bool:
    """Decide whether U = X Ap^T is computed as (Ap X^T)^T, with ranks as rows.

    On a CPU in float32, this is 20 % faster at ranks such as 37, but not for one token. In bfloat16
    it takes 1.3 times as long.
    """
    return x.dtype is torch.float32 and x.is_cpu and len(x) > 1


def fuse_projections(x: Tensor) -> bool:
    """Decide whether layers that read one x (..., in), as q, k and v do, share a forward with grad.

    They do on a GPU with more than 16 tokens. The gain is predicted, not measured: a step of a
    Llama layer has 57 launches instead of 73, and dx is summed inside the products. Up to 16
    tokens, each layer runs two kernels. On a CPU there is no gain.
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
