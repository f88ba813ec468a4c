"""Singular components of products that are never formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """U (out, n) and V (n, in) orthonormal, S (n,) falling: U diag(S) V."""

    U: Tensor
    S: Tensor
    V: Tensor


def svd_of_product(B: Tensor, A: Tensor) -> Components:
    """The exact SVD of B (out, s) times A (s, in), by the QR of each factor."""
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.t())
    U, S, V = torch.linalg.svd(R @ T.t(), full_matrices=False)
    return Components(Q @ U, S, V @ P.t())
