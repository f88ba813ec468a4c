"""Writing a LoRA in the files of a reader, from an adapter of any origin."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.base_layers.linear import is_conv1d
from rasa_ext.checkpoint.adapter import base_name
from rasa_ext.checkpoint.card import Card, lora_card, write_card
from rasa_ext.checkpoint.files import PREFIX
from rasa_ext.checkpoint.lora_experts import checked_layout, expert_factors, targets_of
from rasa_ext.checkpoint.lora_formats import PEFT_FILES, check_format, write_format
from rasa_ext.checkpoint.lora_readers import warn_of_readers
from rasa_ext.checkpoint.lora_view import WEIGHT, Export
from rasa_ext.linalg import svd_of_product
from rasa_ext.methods.base import checked_integer
from rasa_ext.writing import new_folder


def write_lora(
    export: Export,
    directory: str | os.PathLike[str],
    expert_layout: str | None,
    rank: int | None,
    format: str,
    allow_dropped: bool,
    card: Card | None,
) -> int:
    """Write the files; return the written rank.

    Errors, and warnings at the caller's caller, are as in ``rasa_ext.export_lora``.
    """
    layout = checked_layout(export.experts, expert_layout)
    modules, parameters = targets_of(export, layout)
    effective = export.effective_rank()
    written = written_rank(effective, export.experts, rank)
    check_format(format, export)
    if format == PEFT_FILES:
        default = layout is not None and expert_layout is None
        warn_of_readers(export, layout, parameters, default=default, allow_dropped=allow_dropped)
    tensors = dict(factors_of(export, layout, written))
    tensors.update((f"{PREFIX}{key}", tensor) for key, tensor in export.saved.items())
    settings = plain_settings(
        written,
        task_type=export.task_type,
        base_model_name_or_path=base_name(export.root),
        target_modules=modules,
        modules_to_save=list(export.modules_to_save) or None,
        fan_in_fan_out=any(is_conv1d(linear.base) for linear in export.linears.values()),
    )
    if export.tokens:
        settings["trainable_token_indices"] = {t.names[0]: list(t.ids) for t in export.tokens}
    if parameters:
        settings["target_parameters"] = parameters
    text = None
    if card is not None:
        text = lora_card(export, settings, card, format, layout, exact=written >= effective)
    with new_folder(Path(directory)) as folder:
        write_format(format, folder, settings, tensors, export.root)
        write_card(folder, text, directory)
    return written


def written_rank(effective: int, experts: Collection[str], rank: int | None) -> int:
    """Return the rank of all written pairs; ``effective`` is the largest rank.

    Raises TypeError or ValueError, naming the argument, if the rank is not possible.
    """
    if rank is None:
        return effective
    if checked_integer("rank", rank) < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}.")
    if experts and rank < effective:
        raise ValueError(
            f"rank: expected at least {effective}, got {rank}: only adapters of linear layers can "
            f"be written at a lower rank, and {next(iter(experts))!r} has adapted experts; patch "
            "the model with experts=None."
        )
    return rank


def at_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors A (rank, in) and B (out, rank) of the product B A, or of the nearest product.

    Factors of fewer ranks are padded with zeros. If only zeros are above ``rank``, nothing is lost.
    Otherwise both factors get the square roots of the singular values, so that neither is large
    while the other is small.
    """
    if A.shape[0] > rank and not A.is_meta and (A[rank:].any() or B[:, rank:].any()):
        U, S, V = svd_of_product(B.double(), A.double())
        root = S[:rank].sqrt()
        A, B = (root[:, None] * V[:rank]).to(A.dtype), (U[:, :rank] * root).to(B.dtype)
    fill = (0, max(rank - A.shape[0], 0))  # a layer's smaller side may be below the rank, too
    A, B = nn.functional.pad(A, (0, 0, *fill)), nn.functional.pad(B, fill)
    return A[:rank], B[:, :rank]


@torch.no_grad()
def factors_of(export: Export, layout: str | None, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors lora_A and lora_B of every layer, in float32, by key."""
    for name, layer in export.linears.items():
        Ap, Bp = ops.differentiable_pack(layer.factors[WEIGHT], torch.float32)
        A, B = at_rank(Ap, Bp.t(), rank)
        yield f"{PREFIX}{name}.lora_A.weight", A
        yield f"{PREFIX}{name}.lora_B.weight", B
    for path, stack in export.experts.items():
        yield from expert_factors(path, stack, str(layout), rank)


def plain_settings(rank: int, **others: Any) -> dict[str, Any]:
    """Return PEFT's settings for a LoRA of one rank and scale 1.

    Args:
        rank: rank of every layer.
        others: further settings, such as ``target_modules``.

    Returns:
        The content of ``adapter_config.json``.

    Example:
        >>> rasa_ext.checkpoint.plain_settings(8, target_modules=["q_proj"])["lora_alpha"]
        8
    """
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **others,
    }
