"""Products by expert: rows are sorted by expert, and each is multiplied by one expert's matrix.

``offsets`` (E,) int32 holds the row at which each expert's rows end. Nothing here is
differentiable; see ``nn.routed``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm as torch_grouped_mm

from rasa_ext.ops.library import operator

_ALIGNED = 16
"""Alignment in bytes that torch's grouped product needs for strides and addresses."""


def _by_expert_fake(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weights.shape[2]))


@operator(
    "experts_linear(Tensor x, Tensor weights, Tensor offsets) -> Tensor",
    fake=_by_expert_fake,
    composed=True,
)
def experts_linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Compute y (S, n) with y[s] = x[s] weights[e] for the rows s of expert e; weights (E, m, n).

    Uses torch's grouped product where it runs, else a loop over the experts, as in float64.
    """
    if _grouped(x, weights):
        return torch_grouped_mm(x, weights, offs=offsets).contiguous()
    y = x.new_empty((x.shape[0], weights.shape[2]))
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            torch.mm(x[begin:end], weights[expert], out=y[begin:end])
        begin = end
    return y


def _outer_fake(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((offsets.shape[0], x.shape[1], y.shape[1]))


@operator(
    "experts_outer(Tensor x, Tensor y, Tensor offsets) -> Tensor", fake=_outer_fake, composed=True
)
def experts_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """Compute x_e^T y_e (E, m, n) over each expert's rows; zero for an expert without rows."""
    if x.shape[0] and _grouped(x, y):
        return torch_grouped_mm(x.t(), y, offs=offsets).contiguous()
    products = x.new_zeros((offsets.shape[0], x.shape[1], y.shape[1]))
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            torch.mm(x[begin:end].t(), y[begin:end], out=products[expert])
        begin = end
    return products


def experts_rank_multiple(dtype: torch.dtype) -> int:
    """Return the multiple to which the ranks of experts' packs are padded, to align rows."""
    return max(1, _ALIGNED // dtype.itemsize) if dtype != torch.float64 else 1


def pack_experts_backward(
    dAp: Tensor | None, dBp: Tensor | None, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the factors of E experts, in B's dtype; None without dAp or dBp.

    The caller must not use dAp and dBp again: dBp may be overwritten, and results may be views.
    """
    own, pooled, dtype = B.shape[2], 0 if B_pool is None else B_pool.shape[2], B.dtype
    dA = dA_pool = dB = dB_pool = dd = None
    if dAp is not None:
        dAp = dAp[:, : own + pooled].to(dtype)
        dA, dA_pool = dAp[:, :own], None if B_pool is None else dAp[:, own:]
    if dBp is not None:
        dBp = dBp[:, : own + pooled].to(dtype)
        if d is not None:
            # Part by part: joining B with B_pool would need another tensor as large as the pack.
            dots = [torch.linalg.vecdot(dBp[:, :own], B.transpose(1, 2))]
            if B_pool is not None:
                dots.append(torch.linalg.vecdot(dBp[:, own:], B_pool.transpose(1, 2)))
            dd = torch.cat(dots, 1).to(d.dtype)
            dBp.mul_(d.unsqueeze(2))
        dB = dBp[:, :own].mT.contiguous()
        dB_pool = None if B_pool is None else dBp[:, own:].mT.contiguous()
    return dA, dA_pool, dB, dB_pool, dd


def _grouped(x: Tensor, y: Tensor) -> bool:
    """Return whether torch's grouped product accepts these operands."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dtype != y.dtype:
        return False
    return _on_device(x.device) and _is_aligned(x) and _is_aligned(y)


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether rows, or columns, are dense, do not overlap, and start 16-byte aligned."""
    if 0 in tensor.shape:
        return False
    *others, rows, columns = tensor.stride()
    dense, apart, length = (columns, rows, -1) if columns == 1 else (rows, columns, -2)
    if dense != 1 or apart < tensor.shape[length]:
        return False
    size = tensor.element_size()
    starts = (tensor.data_ptr(), *(stride * size for stride in (apart, *others)))
    return all(start % _ALIGNED == 0 for start in starts)


@functools.cache
def _on_device(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"
