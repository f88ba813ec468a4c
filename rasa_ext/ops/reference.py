"""PyTorch kernels of the operators: the fallback of every device and what others are held to.

Each function implements the operator of its name; shapes and contracts stand in ``schemas``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_ext.ops import masks
from rasa_ext.ops.heuristics import adapter_first
from rasa_ext.ops.masks import dropout_mask as dropout_mask
from rasa_ext.ops.reference_layers import linear_layers as linear_layers
from rasa_ext.ops.reference_layers import linear_layers_backward as linear_layers_backward
from rasa_ext.ops.schemas import accumulation_dtype


def pack(
    A: Tensor,
    A_pool: Tensor | None,
    B: Tensor,
    B_pool: Tensor | None,
    d: Tensor | None,
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ap = [A ; A_pool], Bt = [B | B_pool] diag(d), cast to ``dtype`` and zero-padded."""
    rows, columns, rank = [A], [B], A.shape[0]
    if A_pool is not None and B_pool is not None:
        rows.append(A_pool)
        columns.append(B_pool)
        rank += A_pool.shape[0]
    fill = -rank % multiple
    if fill:
        rows.append(A.new_zeros((fill, A.shape[1])))
        columns.append(B.new_zeros((B.shape[0], fill)))
    return torch.cat(rows).to(dtype), _scaled(torch.cat(columns, 1), d, fill, dtype)


def _scaled(Bt: Tensor, d: Tensor | None, fill: int, dtype: torch.dtype) -> Tensor:
    """Bt diag(d), which the caller gives up, in ``dtype``; the last ``fill`` columns are a pad."""
    if d is not None:
        # In the wider of the two dtypes, so that the product is rounded once.
        Bt = Bt.to(torch.promote_types(Bt.dtype, dtype))
        Bt *= torch.nn.functional.pad(d, (0, fill)) if fill else d
    return Bt.to(dtype)


def pack_backward(
    dAp: Tensor, dBt: Tensor, B: Tensor, B_pool: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With T = dBt: dB = T diag(d), dd_j = sum_n [B | B_pool][n, j] T[n, j]; dA is rows of dAp.

    The pool's gradients may be views of dAp and dBt, which the caller gives up; the private ones
    are copies, so that a small gradient does not keep a large one alive.
    """
    own, dtype = B.shape[1], B.dtype
    pooled = 0 if B_pool is None else B_pool.shape[1]
    if d is None:
        dd = B.new_empty(0)
    else:
        T = dBt[:, : own + pooled].to(dtype)
        dd = (T * (B if B_pool is None else torch.cat((B, B_pool), 1))).sum(0)
        dBt = dBt * torch.nn.functional.pad(d, (0, dBt.shape[1] - own - pooled))
    dB = torch.empty(B.shape, dtype=dtype, device=B.device)
    return (
        dAp.narrow(0, 0, own).to(dtype, copy=True),
        dAp.narrow(0, own, pooled).to(dtype),
        dB.copy_(dBt.narrow(1, 0, own)),
        dBt.narrow(1, own, pooled).to(dtype),
        dd,
    )


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    Ap: Tensor,
    Bt: Tensor,
    d: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Y = X W^T + bias + U diag(d) Bt^T, U = X Ap^T."""
    U = masks.project(x, Ap, mask, scale)
    scaled = U if d is None else U * d.to(U.dtype)
    if adapter_first(x.device.type, x.dtype):
        y = torch.mm(scaled, Bt.t()) if bias is None else torch.addmm(bias, scaled, Bt.t())
        return y.addmm_(x, weight.t()), U
    y = torch.nn.functional.linear(x, weight, bias)
    return y.addmm_(scaled, Bt.t()), U


def low_rank_add(
    y: Tensor,
    x: Tensor,
    Ap: Tensor,
    Bt: Tensor,
    d: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Y + U diag(d) Bt^T, U = X Ap^T."""
    U = masks.project(x, Ap, mask, scale)
    return torch.addmm(y, U if d is None else U * d.to(U.dtype), Bt.t()), U


def low_rank_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    U: Tensor,
    Ap: Tensor,
    Bt: Tensor,
    d: Tensor | None,
    need_x: bool,
    need_adapter: bool,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H = G Bt diag(d), T = G^T U diag(d); dX = G W + H Ap, dAp = H^T X, dBt = T."""
    wide = accumulation_dtype(x.dtype)
    dx = dAp = dBt = dd = None
    H = torch.mm(grad, Bt)
    if d is not None:
        if need_adapter:
            dd = (U * H).sum(0, dtype=wide)
        d = d.to(H.dtype)
        H.mul_(d)
    kept = None
    if mask is not None:
        H.mul_(scale)
        kept = masks.unpacked(mask, x)
    if need_x:
        if weight is None or adapter_first(x.device.type, x.dtype):
            dx = torch.mm(H, Ap)
            if kept is not None:
                masks.integers(dx).bitwise_and_(kept)
            if weight is not None:
                dx.addmm_(grad, weight)
        else:
            dx = torch.mm(grad, weight)
            if kept is None:
                dx.addmm_(H, Ap)
            else:
                dx.add_(masks.keep(torch.mm(H, Ap), kept))
    if need_adapter:
        dAp = torch.mm(H.t(), x if kept is None else masks.keep(x, kept)).to(wide)
        # U^T G rather than G^T U: a third faster in float32, and each rank's gradient contiguous.
        scaled = U if d is None else U * d
        dBt = torch.mm(scaled.t(), grad).to(wide).t()
    return (
        grad.new_empty(0) if dx is None else dx,
        grad.new_empty(0, dtype=wide) if dAp is None else dAp,
        grad.new_empty(0, dtype=wide) if dBt is None else dBt,
        grad.new_empty(0, dtype=wide) if dd is None else dd,
    )


def pack_siblings(
    A: list[Tensor],
    A_pool: list[Tensor],
    B: list[Tensor],
    B_pool: list[Tensor],
    d: list[Tensor],
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, list[Tensor]]:
    """[A_1 ; A_pool_1 ; A_2 ; ...] with each one's pad, and every [B_i | B_pool_i] diag(d_i)."""
    rows, ups = [], []
    for i, (down, up) in enumerate(zip(A, B, strict=True)):
        rows.append(down)
        columns, rank = [up], down.shape[0]
        if A_pool:
            rows.append(A_pool[i])
            columns.append(B_pool[i])
            rank += A_pool[i].shape[0]
        fill = -rank % multiple
        if fill:
            rows.append(down.new_zeros((fill, down.shape[1])))
            columns.append(up.new_zeros((up.shape[0], fill)))
        ups.append(_scaled(torch.cat(columns, 1), d[i] if d else None, fill, dtype))
    return torch.cat(rows).to(dtype), ups


def siblings_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    Ap: Tensor,
    Bt: list[Tensor],
    d: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """U = X Ap^T once; Y_i = X W_i^T + bias_i + U_i diag(d_i) Bt_i^T."""
    U = torch.mm(x, Ap.t())
    scaled = U if d is None else U * d.to(U.dtype)
    first = adapter_first(x.device.type, x.dtype)
    y = []
    for i, (weight, up, u) in enumerate(zip(weights, Bt, _columns(scaled, Bt), strict=True)):
        bias = biases[i] if biases and biases[i].numel() else None
        if first:
            out = torch.mm(u, up.t()) if bias is None else torch.addmm(bias, u, up.t())
            y.append(out.addmm_(x, weight.t()))
        else:
            out = torch.nn.functional.linear(x, weight, bias)
            y.append(out.addmm_(u, up.t()))
    return y, U


def siblings_linear_backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    U: Tensor,
    Ap: Tensor,
    Bt: list[Tensor],
    d: Tensor | None,
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """H_i = G_i Bt_i diag(d_i) side by side; dX = sum_i G_i W_i + H Ap, dAp = H^T X."""
    wide = accumulation_dtype(x.dtype)
    dx = dAp = dd = None
    dBt = []
    H = torch.empty_like(U)
    for grad, up, h in zip(grads, Bt, _columns(H, Bt), strict=True):
        torch.mm(grad, up, out=h)
    if d is not None:
        if need_adapter:
            dd = (U * H).sum(0, dtype=wide)
        d = d.to(H.dtype)
        H.mul_(d)
    if need_x:
        # Every product adds to the sum of those before it: no pass over dX of its own.
        first = adapter_first(x.device.type, x.dtype)
        dx = torch.mm(H, Ap) if first else torch.mm(grads[0], weights[0])
        for grad, weight in zip(grads[not first :], weights[not first :], strict=True):
            dx.addmm_(grad, weight)
        if not first:
            dx.addmm_(H, Ap)
    if need_adapter:
        dAp = torch.mm(H.t(), x).to(wide)
        scaled = U if d is None else U * d
        for grad, u in zip(grads, _columns(scaled, Bt), strict=True):
            dBt.append(torch.mm(u.t(), grad).to(wide).t())
    return (
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0, dtype=wide) if dAp is None else dAp,
        dBt,
        x.new_empty(0, dtype=wide) if dd is None else dd,
    )


def _columns(U: Tensor, Bt: list[Tensor]) -> tuple[Tensor, ...]:
    """Each sibling's columns of U (M, Rp)."""
    return U.split([up.shape[1] for up in Bt], 1)


def pack_layers(
    A: list[Tensor],
    A_pool: Tensor | None,
    B: list[Tensor],
    B_pool: Tensor | None,
    d: list[Tensor],
    dtype: torch.dtype,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Every layer's pack, stacked."""
    layers = zip(A, B, d, strict=True)
    packs = (pack(a, A_pool, b, B_pool, v, dtype, multiple) for a, b, v in layers)
    Ap, Bt = zip(*packs, strict=True)
    return torch.stack(Ap), torch.stack(Bt)


def pack_layers_backward(
    dAp: Tensor, dBt: Tensor, B: list[Tensor], B_pool: Tensor | None, d: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every layer's gradients stacked, and the pool's summed from the first layer to the last."""
    layers = zip(dAp, dBt, B, [B_pool] * len(B), d, strict=True)
    dA, dA_pool, dB, dB_pool, dd = zip(*(pack_backward(*layer) for layer in layers), strict=True)
    pool_A, pool_B = dA_pool[0].clone(), dB_pool[0].t().clone(memory_format=torch.contiguous_format)
    for a, b in zip(dA_pool[1:], dB_pool[1:], strict=True):
        pool_A.add_(a)
        pool_B.add_(b.t())
    return torch.stack(dA), pool_A, torch.stack(dB), pool_B.t(), torch.stack(dd)


def delta_layers(Ap: Tensor, Bt: Tensor) -> Tensor:
    """Bt Ap of every layer."""
    wide = accumulation_dtype(Ap.dtype)
    return torch.bmm(Bt.to(wide), Ap.to(wide))


def merge_layers(weights: list[Tensor], Ap: Tensor, Bt: Tensor, sign: float = 1.0) -> None:
    """W += sign * Bt Ap of every layer, summed wide and rounded once."""
    for weight, down, up in zip(weights, Ap, Bt, strict=True):
        wide = torch.promote_types(accumulation_dtype(weight.dtype), accumulation_dtype(down.dtype))
        delta = torch.mm(up.to(wide), down.to(wide))
        weight.copy_(torch.add(weight.to(wide), delta, alpha=sign))
