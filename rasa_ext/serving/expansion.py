"""An adapter's folder as a LoRA, read without its model: whole, or with the pools kept apart."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rasa_ext import ops
from rasa_ext.analysis import ShapesUnknown, factors_by_group
from rasa_ext.checkpoint.files import PREFIX, check_finite, read_adapter
from rasa_ext.checkpoint.lora_file import at_rank, plain_settings
from rasa_ext.checkpoint.lora_readers import VLLM_HEADS
from rasa_ext.ops import Factors
from rasa_ext.patching.grouping import Shape, pattern

Pooled = tuple[Tensor, Tensor, Tensor]
"""A layer's A_pool (n, in), B_pool (out, n) and their d (n,)."""
_OURS = re.compile(r"\.rasa_\w+$")


class Pool(NamedTuple):
    """Ranks that layers of one kind share; the layers change by B diag(d) A."""

    A: Tensor
    """(n, in)"""
    B: Tensor
    """(out, n)"""
    d: dict[str, Tensor]
    """(n,) float32, by name of the layer."""


class Expanded(NamedTuple):
    """A LoRA with scale 1, and the pools that it leaves out."""

    settings: dict[str, Any]
    """Content of ``adapter_config.json``."""
    tensors: dict[str, Tensor]
    """Content of ``adapter_model.safetensors``."""
    pools: list[Pool]
    """Pools that were kept apart: one for all layers whose names differ in the index only."""


@torch.no_grad()
def expand(
    directory: str | os.PathLike[str],
    skeleton: Callable[[], nn.Module] | None = None,
    keeps: Callable[[str], bool] | None = None,
    check: Callable[[dict[str, Any], dict[str, Shape], int], None] | None = None,
) -> Expanded:
    """Read an adapter of any method as a LoRA.

    lora_A is [A ; A_pool], lora_B is [B | B_pool] diag(d) (arXiv 2503.12576, section 3).

    Args:
        directory: what ``save_adapter`` or PEFT's ``save_pretrained`` wrote.
        skeleton: makes the base, possibly on the meta device, if the files lack the layers' shapes.
        keeps: whether a layer's pool is kept apart if other layers share it; by default none is.
        check: called before anything is computed, with the content of ``adapter_config.json``, the
            shapes (out, in) of the layers by name, and the LoRA's rank.

    Returns:
        The LoRA and the pools. A layer's ranks are its own, and at least 1.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the adapter has a part that
            vLLM cannot serve; the message names it.

    Example:
        >>> from rasa_ext.serving.expansion import expand
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)  # two layers
        >>> rasa_ext.save_adapter(model, "adapter")
        >>> expand("adapter").settings["r"]
        9
        >>> expand("adapter", keeps=lambda name: True).settings["r"]
        7
    """
    config, tensors = read_adapter(directory)
    check_finite(tensors, str(directory), "It was not loaded")
    heads = _heads(tensors, directory)
    try:
        groups = factors_by_group(config, tensors, directory)
    except ShapesUnknown:
        if skeleton is None:
            raise
        groups = factors_by_group(config, tensors, directory, skeleton())
    layers: dict[str, Factors] = {}
    shared: dict[tuple[str, Shape], dict[str, Pooled]] = {}
    for group, factors in groups:
        if group.experts:
            raise ValueError(
                f"{directory}: expected an adapter of linear layers, but {group.names[0]} are "
                "experts; write a LoRA with rasa-ext export-lora --expert-layout per-expert."
            )
        layers.update(factors)
        # Some methods make every layer's pool from other tensors.
        pools = {(id(each.A_pool), id(each.B_pool)) for each in factors.values()}
        if keeps is None or len(factors) == 1 or len(pools) > 1:
            continue
        for name, each in factors.items():
            A, A_pool, B, B_pool, d = each
            if A_pool is not None and B_pool is not None and keeps(name):
                own, pooled = (each.A.new_ones(each.rank) if d is None else d).tensor_split(
                    (len(A),)
                )
                shared.setdefault((pattern(name), group.shape), {})[name] = A_pool, B_pool, pooled
                layers[name] = Factors(A, None, B, None, own)
    loras = dict(heads)
    # vLLM takes no LoRA of rank 0.
    ranks = {name: max(len(each.A) + len(_rows(each.A_pool)), 1) for name, each in layers.items()}
    rank = max(ranks.values(), default=0)
    if check is not None:
        shapes = {name: (len(each.B), each.A.shape[1]) for name, each in layers.items()}
        check(config, shapes, rank)
    for name, each in layers.items():
        Ap, Bp = ops.differentiable_pack(each, torch.float32)
        A, B = at_rank(Ap, Bp.t(), ranks[name])
        loras[f"{PREFIX}{name}.lora_A.weight"], loras[f"{PREFIX}{name}.lora_B.weight"] = A, B
    settings = plain_settings(
        rank,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        modules_to_save=sorted({_module(key) for key in heads}) or None,
    )
    return Expanded(settings, loras, [_joined(each) for each in shared.values()])


def _rows(pool: Tensor | None) -> Tensor | tuple[()]:
    return () if pool is None else pool


def _heads(tensors: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the trained heads that vLLM reads; raise ValueError for other trained parameters."""
    others = {key: tensor for key, tensor in tensors.items() if not _OURS.search(key)}
    if refused := [key for key in others if _module(key) not in VLLM_HEADS]:
        names = f"{', '.join(map(_plain, refused[:3]))}{', ...' if len(refused) > 3 else ''}"
        raise ValueError(
            f"{directory}: vLLM serves adapters of linear layers and trained heads named "
            f"{' or '.join(VLLM_HEADS)}, but {names} were trained as well; merge the adapter with "
            "rasa-ext merge."
        )
    return others


def _plain(key: str) -> str:
    return key.removeprefix(PREFIX)


def _module(key: str) -> str:
    return _plain(key).rpartition(".")[0]


def _joined(layers: Mapping[str, Pooled]) -> Pool:
    """Join the pools of layers of one kind; d is zero at the pools of other layers."""
    pools = {id(A): (A, B) for A, B, _ in layers.values()}
    A, B = (torch.cat([pool[side] for pool in pools.values()], side) for side in (0, 1))
    sizes = (len(each) for each, _ in pools.values())
    starts = dict(zip(pools, itertools.accumulate(sizes, initial=0), strict=False))
    d = {}
    for name, (each, _, pooled) in layers.items():
        d[name] = torch.zeros(len(A))
        d[name][starts[id(each)] :][: len(pooled)] = pooled
    return Pool(A, B, d)
