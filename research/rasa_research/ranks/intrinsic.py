"""Ranks planned before training, from the dimension of a model's hidden states (GeLoRA).

GeLoRA (arXiv 2412.09250) gives the layers of block i the rank r_i = max(d_{i+1} - d_i, 0) + 1,
where d_i is the intrinsic dimension of the states that enter the block, by TwoNN. What it leaves
open is a choice of this package: which tokens' states are taken (``pooling``), how a rank is
rounded (to the nearest), and that every linear layer of a block gets the block's rank.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext import RasaConfig
from rasa_ext.methods import checked_integer
from rasa_ext.patching import make_plan
from rasa_research.ranks.hidden_states import POOLINGS, Pooling, pooled_states

_KEPT = 0.9
"""The share of the ratios that TwoNN fits; the largest are the ones that noise reaches first."""
_AT_ONCE = 2**22
"""How many distances are held at a time, 32 MiB of them."""


@torch.no_grad()
def twonn(x: Tensor) -> float:
    """Estimate the intrinsic dimension of points by the distances to their two nearest neighbours.

    With mu = r2 / r1 of every point and F its empirical distribution, the dimension is the slope of
    the line through 0 of -ln(1 - F(mu)) on ln mu, without the upper tenth (Facco et al., 2017,
    doi 10.1038/s41598-017-11873-y). Of equal points one is kept. Computed in float64, in pieces.

    The estimate is low where points are few for their dimension: 2000 points uniform in a cube of
    dimension 10 give about 8.6.

    Args:
        x: points (N, width), of any floating-point dtype, at least 3 of them different.

    Returns:
        The dimension.

    Raises:
        TypeError, ValueError: x is not of that kind, holds NaN or infinity, or no point has
            neighbours at two distances.

    Example:
        >>> from rasa_research.ranks import twonn
        >>> square = torch.rand(1000, 2) @ torch.randn(2, 50)
        >>> round(twonn(square))
        2
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {kind}.")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x: expected points of shape (N, width), got {tuple(x.shape)}.")
    if not x.isfinite().all():
        raise ValueError("x: expected finite numbers, got NaN or infinity.")
    points = torch.unique(x.double(), dim=0)
    count = len(points)
    if count < 3:
        raise ValueError(f"x: expected at least 3 different points, got {count} of {len(x)}.")
    kept = int(_KEPT * count)
    ratios = _neighbour_ratios(points).log().sort().values[:kept]
    if not ratios.any():
        raise ValueError("x: expected neighbours at two distances, but each point's are equal.")
    below = torch.arange(1, kept + 1, dtype=torch.float64, device=x.device) / count
    return float((ratios @ -torch.log1p(-below)) / (ratios @ ratios))


def _neighbour_ratios(x: Tensor) -> Tensor:
    """r2 / r1 of every point: x (N, width) float64, all different, to (N,)."""
    x = x - x.mean(0)  # the closer to the origin, the less the products below cancel
    squares = x.square().sum(1)
    ratios = []
    for rows in torch.arange(len(x), device=x.device).split(max(_AT_ONCE // len(x), 1)):
        near = torch.addmm(squares, x[rows], x.t(), alpha=-2)  # ||x_i - x_j||^2 - ||x_i||^2
        near[torch.arange(len(rows), device=x.device), rows] = math.inf
        nearest = near.topk(2, largest=False).indices
        # The products only find the neighbours: a difference of points is exact where they cancel.
        r = (x[rows, None] - x[nearest]).norm(dim=2)
        ratios.append(r.amax(1) / r.amin(1))
    return torch.cat(ratios)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Find the blocks that a model repeats: its longest ModuleList of modules of one class.

    Lists within the modules of such a list, as experts are, do not count. Of lists equally long the
    first is taken: of an encoder and a decoder the encoder.

    Args:
        model: any model.

    Returns:
        The blocks by their names, in their order.

    Raises:
        ValueError: there is no such list.

    Example:
        >>> from rasa_research.ranks import find_blocks
        >>> list(find_blocks(model))
        ['model.layers.0', 'model.layers.1']
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        like = isinstance(module, nn.ModuleList) and len({type(each) for each in module}) == 1
        if like and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    if not lists:
        raise ValueError(
            "blocks: expected a model with a ModuleList of blocks of one class, found none; give "
            "the blocks themselves."
        )
    name = max(lists, key=lambda each: len(lists[each]))
    return {f"{name}.{i}": block for i, block in enumerate(lists[name])}


def hidden_dimensions(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    blocks: Iterable[nn.Module] | None = None,
    pooling: Pooling = "mean",
    points: int = 2000,
    seed: int = 0,
) -> list[float]:
    """Measure the intrinsic dimension of the hidden states between a model's blocks.

    Every sequence is one point. Which of its states that is, the paper does not say. The mean over
    its tokens depends on all of them at any depth. The last token's state does so after some
    blocks of a causal model, but is a bare embedding before the first; the first token's is for
    models that look both ways. Where most states are equal a warning says so.

    The model runs in eval mode, without gradients, up to its last block, and is left as it was. The
    states are held in float32, (L+1, points, width) of them, on the devices where they arise.

    Args:
        model: with L blocks that take and give hidden states (sequences, tokens, width), first or
            as ``hidden_states``.
        batches: keyword arguments of the model, on its device, such as a tokenizer gives; where
            there is an ``attention_mask`` (sequences, tokens), only tokens with a one count.
        blocks: the blocks in the order in which they run; by default what ``find_blocks`` finds.
        pooling: ``"mean"``, ``"last"`` or ``"first"``, which of a sequence's states make its point.
        points: how many sequences to take, at random where there are more.
        seed: of that choice.

    Returns:
        L + 1 dimensions: of the states that enter each block, and of those that leave the last.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> from rasa_research.ranks import hidden_dimensions
        >>> batches = [{"input_ids": torch.randint(320, (20, 8))} for _ in range(5)]
        >>> len(hidden_dimensions(model, batches))  # of two blocks
        3
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}.")
    if checked_integer("points", points) < 3:
        raise ValueError(f"points: expected at least 3, got {points}.")
    states = pooled_states(model, batches, _named(model, blocks), pooling, points, seed)
    return list(itertools.starmap(_dimension, states.items()))


def block_ranks(dimensions: Sequence[float], k: int = 1) -> list[int]:
    """Turn the dimensions between blocks into the blocks' ranks, max(d_{i+1} - d_i, 0) + k.

    That is GeLoRA's formula with its 1 as k. For RaSA let k be the config's: the shared ranks stand
    for the paper's 1, and max(d_{i+1} - d_i, 0) are the private ranks r_i - k, so that a layer that
    needs none reads the pool alone. Rounded to the nearest integer, a half up, a rank is never
    below the dimensions gained, which the paper has for a lower bound, if k >= 1.

    Args:
        dimensions: L + 1 of them, as ``hidden_dimensions`` gives them.
        k: what every block has at least.

    Returns:
        L ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> from rasa_research.ranks import block_ranks
        >>> block_ranks([4.0, 6.7, 5.2, 5.9])
        [4, 1, 2]
    """
    if checked_integer("k", k) < 1:
        raise ValueError(f"k: expected at least 1, since no rank may be 0, got {k}.")
    if len(dimensions) < 2 or not all(map(math.isfinite, dimensions)):
        raise ValueError(
            f"dimensions: expected one before every block and one after the last, got {dimensions}."
        )
    pairs = itertools.pairwise(dimensions)
    return [math.floor(max(after - before, 0) + 0.5) + k for before, after in pairs]


def rank_pattern(
    model: nn.Module,
    ranks: Sequence[int],
    blocks: Iterable[nn.Module] | None = None,
    target_modules: str | Collection[str] = "all-linear",
) -> dict[str, int]:
    """Give every adapted layer of a block the block's rank, in the form of PEFT's ``rank_pattern``.

    The paper does not say how a block's rank is split over its matrices: here each gets all of it.

    Args:
        model: a model that is not patched.
        ranks: one for each block.
        blocks: as ``hidden_dimensions`` has them.
        target_modules: the layers that will be adapted, as ``patch_model`` has them.

    Returns:
        Ranks by the whole names of layers. Layers outside of the blocks are left to the config.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> from rasa_research.ranks import rank_pattern
        >>> rank_pattern(model, [3, 1], target_modules=["q_proj"])
        {'model.layers.0.self_attn.q_proj': 3, 'model.layers.1.self_attn.q_proj': 1}
    """
    names = list(_named(model, blocks))
    if len(ranks) != len(names):
        raise ValueError(f"ranks: expected one for each of {len(names)} blocks, got {len(ranks)}.")
    groups = make_plan(model, RasaConfig(target_modules=target_modules)).groups
    layers = {name for group in groups for name in group.names}
    return {
        name: rank
        for block, rank in zip(names, ranks, strict=True)
        for name, _ in model.named_modules()
        if name in layers and (name == block or name.startswith(f"{block}."))
    }


def intrinsic_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    blocks: Iterable[nn.Module] | None = None,
    pooling: Pooling = "mean",
    points: int = 2000,
    seed: int = 0,
    k: int = 1,
    target_modules: str | Collection[str] = "all-linear",
) -> dict[str, int]:
    """Plan the rank of every layer from the dimension of the hidden states around its block.

    ``hidden_dimensions``, ``block_ranks`` and ``rank_pattern``, one after the other. The paper is
    GeLoRA, arXiv 2412.09250; what it leaves open is told there.

    Args:
        model, batches, blocks, pooling, points, seed: as in ``hidden_dimensions``.
        k: as in ``block_ranks``: 1 for a LoRA, the config's k for RaSA.
        target_modules: as in ``rank_pattern``.

    Returns:
        A ``rank_pattern``: ranks by the names of layers.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> from rasa_research.ranks import intrinsic_ranks
        >>> batches = [{"input_ids": torch.randint(320, (20, 8))} for _ in range(5)]
        >>> ranks = intrinsic_ranks(model, batches, target_modules=["q_proj"])
        >>> list(ranks)
        ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj']
    """
    chosen = None if blocks is None else list(blocks)
    dimensions = hidden_dimensions(model, batches, chosen, pooling, points, seed)
    return rank_pattern(model, block_ranks(dimensions, k), chosen, target_modules)


def _dimension(place: str, states: Tensor) -> float:
    try:
        found = twonn(states)
    except ValueError as error:
        reason = str(error).removeprefix("x: ")
        raise ValueError(
            f"batches: the hidden states {place} have no dimension: {reason} Give more, and other, "
            "sequences, or another pooling."
        ) from None
    different = len(states.unique(dim=0))
    if 2 * different < len(states):
        warnings.warn(
            f"only {different} of {len(states)} hidden states {place} differ, and their dimension "
            "is that of so few points; try another pooling.",
            stacklevel=3,
        )
    return found


def _named(model: nn.Module, blocks: Iterable[nn.Module] | None) -> dict[str, nn.Module]:
    if blocks is None:
        return find_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    given = list(blocks)
    if not given or any(block not in names for block in given):
        raise ValueError("blocks: expected modules of the model, got none or one of another.")
    return {names[block]: block for block in given}
