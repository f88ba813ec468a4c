"""The operators of namespace ``rasa_ext``: their schemas, and nothing else.

Symbols: M tokens, ``in``/``out`` features, R = r - k + L*k the effective rank, Rp = R rounded up to
``multiple`` (pads are zero). ``x`` and ``grad`` are 2-D; flattening is the caller's.

The diagonal d (R,) is either folded into the pack, or left out of it (``d=None``) and handed to the
linear, which applies it to U: ``heuristics.diagonal_in_pack`` says where which is cheaper. Kernels
of a device whose packs carry the diagonal may refuse it in the linear.

- ``pack``: ``Ap = [A ; A_pool]`` (Rp, in), ``Bt = [B | B_pool] diag(d)`` (out, Rp), in ``dtype``.
- ``pack_backward``: gradients of A, A_pool, B, B_pool and d in B's dtype, from those of Ap and Bt;
  that of d has no elements where d is None.
- ``low_rank_linear``: ``y = x W^T + bias + U diag(d) Bt^T`` with ``U = x Ap^T`` (M, Rp); x, weight,
  bias, Ap and Bt are of one dtype.
- ``low_rank_add``: ``out = y + U diag(d) Bt^T``, for bases that are not a plain GEMM.
- ``low_rank_linear_backward``: ``dx = grad W + H Ap`` with ``H = grad Bt diag(d)``,
  ``dAp = H^T x``, ``dBt = grad^T U diag(d)`` and ``dd_j = sum_m U[m, j] (grad Bt)[m, j]``;
  ``weight=None`` is the backward of ``low_rank_add``. Those of the adapter come in the accumulation
  dtype (float32, or float64 for float64). dBt and pack_backward's dB_pool are column-major, the
  order in which the GEMM is fastest and in which a pool's L gradients are summed. What is not
  needed comes back with no elements.

Dropout is on the adapter's input alone. ``mask`` of the three linears holds a bit for each element
of x, whether the adapter sees it, and ``scale`` is what the rest is multiplied with: wherever x
stands beside Ap it is ``scale * (x where kept, else 0)``. That is folded into U and H, so that in
low precision no element of x is rounded again. U includes it.

- ``dropout_mask``: uint8 (ceil(x.numel() / 8),); bit e % 8 of byte e // 8 says whether element e of
  x, counted along its rows, is kept, which has the probability 1 - p in steps of 2^-16. Bits behind
  the last element mean nothing. ``noise`` is int64 of uniformly distributed bits, as many as
  ``heuristics.noise_words`` says; of x only the shape matters.

Over n siblings, layers that read the same x, with their ranks side by side: Rp = sum of Rp_i. Lists
have one entry a sibling, or none where nobody has such a tensor; a bias without elements is none.

- ``pack_siblings``: one Ap (Rp, in) with the siblings' rows in their order, and each one's
  Bt_i (out_i, Rp_i).
- ``siblings_linear``: ``y_i = x W_i^T + bias_i + U_i diag(d_i) Bt_i^T`` with one U = x Ap^T
  (M, Rp), of which U_i are the sibling's columns; d (Rp,) is every sibling's, padded as Ap is.
- ``siblings_linear_backward``: ``dx = sum_i grad_i W_i + H Ap``, ``dAp = H^T x``,
  ``dBt_i = grad_i^T U_i diag(d_i)`` and dd, as above.

Over the L layers of one group, which share A_pool and B_pool, results stacked along a new first
dimension:

- ``pack_layers``: ``pack`` of every layer; Ap (L, Rp, in), Bt (L, out, Rp).
- ``pack_layers_backward``: ``pack_backward`` of every layer; the pool's gradients summed over the
  layers in their order, dA_pool (Lk, in) and dB_pool (out, Lk).
- ``delta_layers``: ``Bt Ap`` of every layer, (L, out, in) in the accumulation dtype.
- ``merge_layers``: ``W += sign * Bt Ap`` in place, summed wide and rounded once.
- ``linear_layers``: L low-rank linears on given activations, x (L, M, in) to y (L, M, out), with
  ``y_l = x_l W_l^T + bias_l + U_l Bt_l^T + V_l diag(d_l) Bt_pool^T``, ``U_l = x_l Ap_l^T``
  (L, M, Rp) and ``V_l = x_l Ap_pool^T`` (L, M, P). Ap (L, Rp, in) and Bt (L, out, Rp) are packs,
  bias is (L, out), and Ap_pool (P, in), Bt_pool (out, P) a pack of a pool, read by all layers and
  nowhere repeated; d_pool (L, P) in any dtype, for it would have to be repeated to be folded. All
  three are None where there is no pool or it stands in the packs, and V then has no elements.
- ``linear_layers_backward``: dx, dAp (L, Rp, in) and dBt (L, out, Rp) as above, those of the
  pool's pack summed over the layers (one product over all tokens of all layers), dd_pool (L, P).

No output of an operator aliases an input or another output.
"""

from __future__ import annotations

import torch

SCHEMAS: tuple[str, ...] = (
    "pack(Tensor A, Tensor? A_pool, Tensor B, Tensor? B_pool, Tensor? d, ScalarType dtype, "
    "int multiple=1) -> (Tensor Ap, Tensor Bt)",
    "pack_backward(Tensor dAp, Tensor dBt, Tensor B, Tensor? B_pool, Tensor? d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)",
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor Ap, Tensor Bt, "
    "Tensor? d=None, Tensor? mask=None, float scale=1.0) -> (Tensor y, Tensor U)",
    "low_rank_add(Tensor y, Tensor x, Tensor Ap, Tensor Bt, Tensor? d=None, Tensor? mask=None, "
    "float scale=1.0) -> (Tensor out, Tensor U)",
    "low_rank_linear_backward(Tensor grad, Tensor x, Tensor? weight, Tensor U, Tensor Ap, "
    "Tensor Bt, Tensor? d, bool need_x, bool need_adapter, Tensor? mask=None, "
    "float scale=1.0) -> (Tensor dx, Tensor dAp, Tensor dBt, Tensor dd)",
    "dropout_mask(Tensor noise, Tensor x, float p) -> Tensor",
    "pack_siblings(Tensor[] A, Tensor[] A_pool, Tensor[] B, Tensor[] B_pool, Tensor[] d, "
    "ScalarType dtype, int multiple=1) -> (Tensor Ap, Tensor[] Bt)",
    "siblings_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor Ap, Tensor[] Bt, "
    "Tensor? d=None) -> (Tensor[] y, Tensor U)",
    "siblings_linear_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor U, Tensor Ap, "
    "Tensor[] Bt, Tensor? d, bool need_x, bool need_adapter) -> "
    "(Tensor dx, Tensor dAp, Tensor[] dBt, Tensor dd)",
    "pack_layers(Tensor[] A, Tensor? A_pool, Tensor[] B, Tensor? B_pool, Tensor[] d, "
    "ScalarType dtype, int multiple=1) -> (Tensor Ap, Tensor Bt)",
    "pack_layers_backward(Tensor dAp, Tensor dBt, Tensor[] B, Tensor? B_pool, Tensor[] d) -> "
    "(Tensor dA, Tensor dA_pool, Tensor dB, Tensor dB_pool, Tensor dd)",
    "delta_layers(Tensor Ap, Tensor Bt) -> Tensor",
    "merge_layers(Tensor(a!)[] weights, Tensor Ap, Tensor Bt, float sign=1.0) -> ()",
    "linear_layers(Tensor x, Tensor[] weights, Tensor? bias, Tensor Ap, Tensor Bt, "
    "Tensor? Ap_pool, Tensor? Bt_pool, Tensor? d_pool) -> (Tensor y, Tensor U, Tensor V)",
    "linear_layers_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor U, Tensor V, "
    "Tensor Ap, Tensor Bt, Tensor? Ap_pool, Tensor? Bt_pool, Tensor? d_pool, bool need_x, "
    "bool need_adapter) -> (Tensor dx, Tensor dAp, Tensor dBt, Tensor dAp_pool, Tensor dBt_pool, "
    "Tensor dd_pool)",
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
