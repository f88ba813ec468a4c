"""A LoRA at a chosen rank: the nearest of that rank to every layer's change, and how near."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext.linalg import svd_of_product
from rasa_ext.methods.base import checked_integer
from rasa_ext.patching.state import adapted_experts, adapted_layers, patch_state


class Truncation(NamedTuple):
    """What a LoRA of a chosen rank lacks, relative and in the Frobenius norm.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> found = rasa_ext.export_error(model, rank=4)  # not yet trained: dW is zero
        >>> found.error, found.layers["model.layers.0.mlp.down_proj"]
        (0.0, 0.0)
    """

    error: float
    """||dW' - dW|| / ||dW|| over all layers together."""
    layers: dict[str, float]
    """The same of every layer, by name; 0 where nothing is cut off or dW is zero."""


@torch.no_grad()
def export_error(model: nn.Module, rank: int) -> Truncation:
    """Tell how far ``export_lora(model, directory, rank=rank)`` is from the adapter.

    Each layer's dW' is the truncated SVD of its dW = [B | B_pool] diag(d) [A ; A_pool] (arXiv
    2503.12576, section 3), which no matrix of that rank is nearer to. In float64, from the factors.

    Args:
        model: a patched model.
        rank: as in ``export_lora``.

    Returns:
        The error in all and of every layer; zeros if ``rank`` is at least the effective rank.

    Raises:
        TypeError, ValueError: the model is not patched, or has adapted experts, or ``rank`` is no
            positive integer.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)  # R = 9
        >>> rasa_ext.export_error(model, rank=9).error
        0.0
    """
    patch_state(model)
    check_rank(rank, dict(adapted_experts(model)))
    lost, whole = {}, {}
    for name, layer in adapted_layers(model):
        Ap, Bp = layer.packed_factors()
        S = svd_of_product(Bp.t().double(), Ap.double()).S.square()
        whole[name] = S.sum().item()
        lost[name] = 0.0 if rank >= Ap.shape[0] else S[rank:].sum().item()
    ratios = {name: _ratio(lost[name], whole[name]) for name in whole}
    return Truncation(_ratio(sum(lost.values()), sum(whole.values())), ratios)


def check_rank(rank: int, experts: Collection[str], pad_to: int | None = None) -> None:
    """Raise TypeError or ValueError, naming the argument, where no LoRA of ``rank`` can be made.

    ``experts`` are the names of adapted experts, which have no such LoRA.
    """
    if checked_integer("rank", rank) < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}.")
    if pad_to is not None:
        raise ValueError(
            f"pad_to: expected None beside rank, which is the rank that is written, got {pad_to}."
        )
    if experts:
        raise ValueError(
            "model: a LoRA of a chosen rank is made of adapters of linear layers, but "
            f"{next(iter(experts))!r} has adapted experts; patch it with experts=None."
        )


def at_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Give factors A (rank, in) and B (out, rank) of the product B A, or of the nearest to it.

    Factors of fewer ranks are filled up with zeros; no more than zeros above it lose nothing. The
    singular values of others go to both factors alike, so that neither is large where the other is
    small.
    """
    if A.shape[0] > rank and not A.is_meta and (A[rank:].any() or B[:, rank:].any()):
        U, S, V = svd_of_product(B.double(), A.double())
        root = S[:rank].sqrt()
        A, B = (root[:, None] * V[:rank]).to(A.dtype), (U[:, :rank] * root).to(B.dtype)
    fill = (0, max(rank - A.shape[0], 0))  # a layer's smaller side may be below the rank, too
    A, B = nn.functional.pad(A, (0, 0, *fill)), nn.functional.pad(B, fill)
    return A[:rank], B[:, :rank]


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
