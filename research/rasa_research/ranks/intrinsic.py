"""Rank planning before training, from the dimension of a model's hidden states (GeLoRA).

In GeLoRA (arXiv 2412.09250), the layers of block i have rank r_i = max(d_{i+1} - d_i, 0) + 1. d_i
is the intrinsic dimension of the block's input states by TwoNN. The paper leaves some choices open.
This package chooses the pooling of tokens (``pooling``), rounding to the nearest rank, and the
block's rank for every linear layer in the block.
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
"""The share of ratios that TwoNN fits. The largest are left out, since they are the noisiest."""
_AT_ONCE = 2**22
"""Number of distances in memory at a time: 32 MiB."""


@torch.no_grad()
def twonn(x: Tensor) -> float:
    """Estimate the intrinsic dimension of points from distances to the two nearest neighbours.

    With mu = r2 / r1 of every point and F the empirical distribution of mu, fit a line through 0 to
    -ln(1 - F(mu)) over ln mu, without the upper tenth. The dimension is the slope (Facco et al.,
    2017, doi 10.1038/s41598-017-11873-y). Duplicate points count once. The computation is in
    float64, in chunks.

    The estimate is too low if there are few points for the dimension: 2000 uniform points in a cube
    of dimension 10 give about 8.6.

    Args:
        x: points (N, width), of any floating-point dtype, with at least 3 different points.

    Returns:
        The estimated dimension.

    Raises:
        TypeError, ValueError: x is not such a tensor, contains NaN or infinity, or no point has
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
        raise ValueError(
            "x: expected neighbours at two distances, got equal distances at every point."
        )
    below = torch.arange(1, kept + 1, dtype=torch.float64, device=x.device) / count
    return float((ratios @ -torch.log1p(-below)) / (ratios @ ratios))


def _neighbour_ratios(x: Tensor) -> Tensor:
    """Return r2 / r1 of every point, (N,); x (N, width) is float64, with all points different."""
    x = x - x.mean(0)  # the closer to the origin, the less the products below cancel
    squares = x.square().sum(1)
    ratios = []
    for rows in torch.arange(len(x), device=x.device).split(max(_AT_ONCE // len(x), 1)):
        near = torch.addmm(squares, x[rows], x.t(), alpha=-2)  # ||x_i - x_j||^2 - ||x_i||^2
        near[torch.arange(len(rows), device=x.device), rows] = math.inf
        nearest = near.topk(2, largest=False).indices
        # Products only select the neighbours: differences of points stay exact under cancellation.
        r = (x[rows, None] - x[nearest]).norm(dim=2)
        ratios.append(r.amax(1) / r.amin(1))
    return torch.cat(ratios)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Find the repeated blocks of a model: the longest ModuleList with modules of one class.

    Lists inside such a list, for example experts, do not count. Among equally long lists the first
    one is used: the encoder if there are an encoder and a decoder.

    Args:
        model: any model.

    Returns:
        The blocks by name, in order.

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
            "blocks: expected a model with a ModuleList of blocks of one class, found none; pass "
            "the blocks."
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

    Every sequence is one point. The paper does not say how to pool a sequence's states. The mean
    over tokens depends on all tokens at any depth. In a causal model, the last token's state
    depends on all tokens after some blocks, but is a bare embedding before the first block. The
    first token's state is useful for bidirectional models. A warning says if most states are equal.

    The model runs in eval mode, without gradients, up to the last block; the modes are restored
    afterwards. The states need memory for (L+1, points, width) float32 values on the devices of the
    blocks.

    Args:
        model: a model with L blocks that take hidden states (sequences, tokens, width) as first
            argument or as ``hidden_states``, and return them.
        batches: keyword arguments of the model, on the model's device, for example from a
            tokenizer. With an ``attention_mask`` (sequences, tokens), only tokens with a one count.
        blocks: the blocks in running order; defaults to the result of ``find_blocks``.
        pooling: ``"mean"``, ``"last"`` or ``"first"``: which tokens' states make the point.
        points: number of sequences to use, drawn at random if there are more.
        seed: seed of that draw.

    Returns:
        L + 1 dimensions: of each block's input states, then of the last block's output states.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

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
    """Compute the blocks' ranks max(d_{i+1} - d_i, 0) + k from the dimensions between blocks.

    This is GeLoRA's formula with k in place of 1. For RaSA, use the config's k: the shared ranks
    replace the paper's 1, and the private ranks are r_i - k = max(d_{i+1} - d_i, 0). A layer
    without private ranks then only reads the pool. The difference is rounded to the nearest
    integer, a half up. With k >= 1 a rank is never below the gain in dimension, the paper's lower
    bound.

    Args:
        dimensions: L + 1 dimensions, for example from ``hidden_dimensions``.
        k: the least rank of a block.

    Returns:
        L ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

    Example:
        >>> from rasa_research.ranks import block_ranks
        >>> block_ranks([4.0, 6.7, 5.2, 5.9])
        [4, 1, 2]
    """
    if checked_integer("k", k) < 1:
        raise ValueError(f"k: expected at least 1, since no rank may be 0, got {k}.")
    if len(dimensions) < 2 or not all(map(math.isfinite, dimensions)):
        raise ValueError(
            "dimensions: expected finite numbers, one before every block and one after the last, "
            f"got {dimensions}."
        )
    pairs = itertools.pairwise(dimensions)
    return [math.floor(max(after - before, 0) + 0.5) + k for before, after in pairs]


def rank_pattern(
    model: nn.Module,
    ranks: Sequence[int],
    blocks: Iterable[nn.Module] | None = None,
    target_modules: str | Collection[str] = "all-linear",
) -> dict[str, int]:
    """Return the block's rank for every adapted layer, in the form of PEFT's ``rank_pattern``.

    The paper does not say how to split a block's rank over matrices; here each matrix gets all of
    it.

    Args:
        model: an unpatched model.
        ranks: one rank for each block.
        blocks: as in ``hidden_dimensions``.
        target_modules: the layers that will be adapted, as in ``patch_model``.

    Returns:
        Ranks by full layer name. Layers outside the blocks are missing and get the config's rank.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

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

    This runs ``hidden_dimensions``, ``block_ranks`` and ``rank_pattern``, which describe the
    choices that the paper (GeLoRA, arXiv 2412.09250) leaves open.

    Args:
        model, batches, blocks, pooling, points, seed: as in ``hidden_dimensions``.
        k: as in ``block_ranks``: 1 for a LoRA, the config's k for RaSA.
        target_modules: as in ``rank_pattern``.

    Returns:
        A ``rank_pattern``: ranks by full layer name.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.

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
            f"batches: the dimension of the hidden states {place} cannot be estimated: {reason} "
            "Pass more or other sequences, or another pooling."
        ) from None
    different = len(states.unique(dim=0))
    if 2 * different < len(states):
        warnings.warn(
            f"only {different} of {len(states)} hidden states {place} differ, so their dimension "
            "comes from few points; try another pooling.",
            stacklevel=3,
        )
    return found


def _named(model: nn.Module, blocks: Iterable[nn.Module] | None) -> dict[str, nn.Module]:
    if blocks is None:
        return find_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    given = list(blocks)
    if not given or any(block not in names for block in given):
        raise ValueError("blocks: expected modules of the model, got none or another module.")
    return {names[block]: block for block in given}
