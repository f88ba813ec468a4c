"""Singular value decomposition of low-rank products, without forming the product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Components", "svd_of_product"]


class Components(NamedTuple):
    """SVD U diag(S) V with U (out, n) and V (n, in) orthonormal, S (n,) descending."""

    U: Tensor
    S: Tensor
    V: Tensor


def svd_of_product(B: Tensor, A: Tensor) -> Components:
    """Compute the exact SVD of the product B A, by QR of each factor.

    Args:
        B: (out, s).
        A: (s, in).

    Returns:
        U, S and V of B A.

    Example:
        >>> from rasa_ext.linalg import svd_of_product
        >>> svd_of_product(torch.eye(3)[:, :2], torch.eye(2)).S
        tensor([1., 1.])
    """
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.t())
    U, S, V = torch.linalg.svd(R @ T.t(), full_matrices=False)
    return Components(Q @ U, S, V @ P.t())
