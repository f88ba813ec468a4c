"""The operators of namespace ``rasa_ext``: their schemas, and nothing else.

Symbols: M tokens, ``in``/``out`` features, R = r - k + L*k the effective rank, Rp = R rounded up to
``multiple`` (pads are zero). ``x`` and ``grad`` are 2-D; flattening is the caller's.

- ``pack``: ``Ap = [A ; A_pool]`` (Rp, in), ``Bt = [B | B_pool] diag(d)`` (out, Rp), in ``dtype``.
- ``pack_backward``: gradients of A, A_pool, B, B_pool and d in d's dtype, from those of Ap and Bt.
- ``low_rank_linear``: ``y = x W^T + bias + U Bt^T`` with ``U = x Ap^T`` (M, Rp), all of one dtype.
- ``low_rank_add``: ``out = y + U Bt^T``, for bases that are not a plain GEMM.
- ``low_rank_linear_backward``: ``dx = grad W + H Ap`` with ``H = grad Bt``, ``dAp = H^T x`` and
  ``dBt = grad^T U``; ``weight=None`` is the backward of ``low_rank_add``. dAp and dBt come in the
  accumulation dtype (float32, or float64 for float64). dBt and pack_backward's dB_pool are
  column-major, the order in which the GEMM is fastest and in which a pool's L gradients are summed.
  What is not needed comes back with no elements.

No output aliases an input or another output.
"""

from __future__ import annotations

import torch

SCHEMAS: tuple[str, ...] = (
    "pack(Tensor A, Tensor? A_pool, Tensor B, Tensor? B_pool, Tensor d, ScalarType dtype, "
    "int multiple=1) -> (Tensor Ap, Tensor Bt)",
    "pack_backward(Tensor dAp, Tensor dBt, Tensor B, Tensor? B_pool, Tensor d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)",
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor Ap, Tensor Bt) -> "
    "(Tensor y, Tensor U)",
    "low_rank_add(Tensor y, Tensor x, Tensor Ap, Tensor Bt) -> (Tensor out, Tensor U)",
    "low_rank_linear_backward(Tensor grad, Tensor x, Tensor? weight, Tensor U, Tensor Ap, "
    "Tensor Bt, bool need_x, bool need_adapter) -> (Tensor dx, Tensor dAp, Tensor dBt)",
)

LIBRARY = torch.library.Library("rasa_ext", "DEF")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weight gradients of a computation in ``dtype`` are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(rank: int, multiple: int) -> int:
    """``rank`` rounded up to a multiple of ``multiple``."""
    return -(-rank // multiple) * multiple
