"""Exact export of a RaSA adapter as a plain LoRA: lora_A = Ap, lora_B = Bp^T, scale 1, rank R."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from rasa_ext import ops
from rasa_ext.checkpoint.adapter import saved_tensors, task_type
from rasa_ext.checkpoint.card import PLAIN, Card
from rasa_ext.checkpoint.lora_experts import checked_layout
from rasa_ext.checkpoint.lora_file import factors_of, write_lora, written_rank
from rasa_ext.checkpoint.lora_formats import PEFT_FILES
from rasa_ext.checkpoint.lora_readers import INSTEAD
from rasa_ext.checkpoint.lora_view import WEIGHT, Adapted, Export
from rasa_ext.linalg import svd_of_product
from rasa_ext.nn.rasa import AdapterOwner
from rasa_ext.patching.state import (
    adapted_experts,
    adapted_layers,
    check_merge_is_current,
    patch_state,
    trained_by_hand,
    unwrap,
)
from rasa_ext.patching.swap import FAST_PATH
from rasa_ext.patching.tokens import row_tensors


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    expert_layout: str | None = None,
    rank: int | None = None,
    format: str = PEFT_FILES,
    allow_dropped: bool = False,
    card: Card | None = PLAIN,
) -> int:
    """Write the adapter as a LoRA for PEFT, vLLM, SGLang, llama.cpp or mlx-lm.

    Not every reader supports ranks and scales per layer. So every layer has scale 1 and the largest
    effective rank, padded with zeros. The LoRA's product is the adapter's dW in
    float32: lora_B = [B | B_pool] diag(d), (out, R), and lora_A = [A ; A_pool], (R, in), from the
    definition of dW (arXiv 2503.12576, section 3).

    A warning names what some reader refuses. An error is raised for what a reader would drop
    silently: trained norms (llama.cpp), k or v without q, up without gate, and trained embedding
    rows (SGLang).

    No layout for adapted experts suits all readers. In the files each expert has R ranks, the pool
    included, which may make them large: ``export_size`` counts the bytes.

    Args:
        model: a patched model.
        directory: created if missing; an adapter in it is replaced.
        expert_layout: how adapted experts are written. "peft" is the layout of PEFT's
            ``target_parameters``, for PEFT, and for vLLM where it stores a model's experts in three
            dimensions (gpt-oss). "per-expert" names the matrices of every expert as checkpoints do,
            for vLLM, SGLang and llama.cpp. "shared-outer" is SGLang's for experts that share the
            factors on their input and output, only for ``experts="shared"`` with k = rank. None is
            "peft", with a warning if the model has adapted experts.
        rank: the rank to write; by default the largest effective rank. Factors of fewer ranks are
            padded with zeros. Layers of more ranks become the best approximation of dW with that
            rank, and ``export_error`` measures the error.
        format: "peft" is for PEFT, vLLM, SGLang and llama.cpp's converter. "gguf" is the
            converter's output, ``adapter.gguf``, and needs the package gguf. "mlx" is for mlx-lm.
            The last two only hold low-rank pairs, of model families whose names were checked.
        allow_dropped: write even what some reader drops, with a warning; for other readers, such
            as PEFT.
        card: additions to the model card, README.md, such as ``Card.read("adapter")``; None writes
            no card. An edited card stays.

    Returns:
        The written rank; a server's ``max_lora_rank`` must be at least this.

    Raises:
        TypeError, ValueError: the model is not patched, the adapter cannot have this
            ``expert_layout``, ``rank`` is no positive integer or, with adapted experts, below the
            largest effective rank, or ``format`` is unknown or cannot hold the adapter.
        ImportError: ``format`` is "gguf", and the package is missing.
        ValueError: a reader would drop a part of the adapter, or parameters unfrozen by hand.

    Example:
        Two layers: R = 8 - 1 + 2 * 1 = 9.

        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> rasa_ext.export_lora(model, "lora")
        9
        >>> rasa_ext.export_lora(model, "lora", rank=16)  # one of the ranks that vLLM takes
        16
        >>> rasa_ext.export_lora(model, "lora", rank=4)  # no longer exact
        4
    """
    export = _export_of(model)
    return write_lora(export, directory, expert_layout, rank, format, allow_dropped, card)


def export_size(
    model: nn.Module, *, expert_layout: str | None = None, rank: int | None = None
) -> int:
    """Count the bytes of the tensors that ``export_lora`` would write, without making them.

    Args:
        model: a patched model.
        expert_layout, rank: as in ``export_lora``.

    Returns:
        Bytes; the file is slightly larger, because of the tensors' names.

    Raises:
        TypeError, ValueError: as ``export_lora``, for the model and these arguments.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> rasa_ext.export_size(model)  # two layers of 9 * (48 + 32) numbers in float32
        5760
    """
    export = _export_of(model, "meta")
    layout = checked_layout(export.experts, expert_layout)
    written = written_rank(export.effective_rank(), export.experts, rank)
    factors = dict(factors_of(export, layout, written))
    return sum(tensor.nbytes for tensor in (*factors.values(), *export.saved.values()))


class Truncation(NamedTuple):
    """Relative error, in the Frobenius norm, of a LoRA of a chosen rank.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> truncation = rasa_ext.export_error(model, rank=4)  # not yet trained: dW is zero
        >>> truncation.error, truncation.layers["model.layers.0.mlp.down_proj"]
        (0.0, 0.0)
    """

    error: float
    """||dW' - dW|| / ||dW|| over all layers together."""
    layers: dict[str, float]
    """The error of every layer, by name; 0 if nothing is cut off or dW is zero."""


@torch.no_grad()
def export_error(model: nn.Module, rank: int) -> Truncation:
    """Compute the error of ``export_lora(model, directory, rank=rank)`` against the adapter.

    Each layer's dW' is the truncated SVD of dW = [B | B_pool] diag(d) [A ; A_pool] (arXiv
    2503.12576, section 3), the best approximation of that rank. It is computed in float64, from the
    factors.

    Args:
        model: a patched model.
        rank: as in ``export_lora``.

    Returns:
        The total error and the error of every layer; zeros if ``rank`` is at least the effective
        rank.

    Raises:
        TypeError, ValueError: the model is not patched, or ``rank`` is no positive integer or,
            with adapted experts, below the largest effective rank.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)  # R = 9
        >>> rasa_ext.export_error(model, rank=9).error
        0.0
    """
    export = _export_of(model, "meta")
    written_rank(export.effective_rank(), export.experts, rank)
    lost, whole = {}, {}
    for name, layer in adapted_layers(model):
        Ap, Bp = ops.differentiable_pack(layer.adapter().factors(), torch.float32)
        S = svd_of_product(Bp.t().double(), Ap.double()).S.square()
        whole[name] = S.sum().item()
        lost[name] = 0.0 if rank >= Ap.shape[0] else S[rank:].sum().item()
    ratios = {name: math.sqrt(lost[name] / whole[name] if whole[name] else 0.0) for name in whole}
    total = sum(whole.values())
    return Truncation(math.sqrt(sum(lost.values()) / total if total else 0.0), ratios)


def _export_of(model: nn.Module, device: str | None = None) -> Export:
    """Describe a patched model for export, without changing it; ``device`` is for the factors.

    On "meta" the factors have shapes only, and take no memory.
    """
    state, root = patch_state(model), unwrap(model)
    check_merge_is_current(root)
    if by_hand := list(trained_by_hand(root)):
        raise ValueError(
            f"model: expected no trained parameters beside the adapter, but {by_hand[0]} (one of "
            f"{len(by_hand)}) was unfrozen by hand; name its module in modules_to_save when "
            f"patching, or {INSTEAD}."
        )

    def adapted(base: Any, layers: Mapping[str, AdapterOwner]) -> Adapted:
        factors = {name: layer.adapter().factors() for name, layer in layers.items()}
        return Adapted(base, {name: f.map(lambda t: t.to(device)) for name, f in factors.items()})

    return Export(
        root=root,
        config=state.config,
        linears={
            name: adapted(layer.base_layer, {WEIGHT: layer}) for name, layer in adapted_layers(root)
        },
        experts={
            name: adapted(experts.base_layer, experts.stacks())
            for name, experts in adapted_experts(root)
        },
        saved={
            **{key: rows.detach() for key, rows in row_tensors(root).items()},
            **saved_tensors(root, state.plan),
        },
        modules_to_save=state.plan.modules_to_save,
        tokens=state.plan.tokens,
        task_type=task_type(root),
        fast_path=any(name == FAST_PATH and usual for _, name, usual in state.attributes_before),
    )
