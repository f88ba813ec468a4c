"""Analysis of an adapter's effect on each layer: effective ranks, and use of the pool.

The effective rank is exp of the entropy of the normalized singular values (Roy and Vetterli, 2007).
Other work on adapters, such as arXiv 2412.00029, may define it differently.

Everything is computed from the factors, by QR: no (out, in) matrix is formed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rasa_ext.base_layers.survey import survey
from rasa_ext.checkpoint.adapter import own_key, pool_key
from rasa_ext.checkpoint.files import PREFIX, read_adapter
from rasa_ext.checkpoint.lora import Lora, read_lora
from rasa_ext.methods import read_method
from rasa_ext.methods.base import OFFICIAL, AdapterConfig
from rasa_ext.ops import Factors
from rasa_ext.patching.grouping import Group, as_saved, groups_of
from rasa_ext.patching.state import owners, patch_state
from rasa_ext.patching.targets import make_plan, resolve_config


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """Analysis of one layer's change dW = [B | B_pool] diag(d) [A ; A_pool]."""

    name: str
    singular_values: Tensor
    """(min(R, in, out),) float64, descending."""
    effective_rank: float
    """exp of the entropy of the normalized singular values (Roy and Vetterli, 2007); 0 for
    no change."""
    private_share: float
    """||private part||^2 / (||private part||^2 + ||pooled part||^2)."""
    pool_use: Tensor
    """(L*k,) float64: per slot of the pool, the norm of the slot's change to this layer. That is
    |d_j| times the norms of the slot's two vectors."""
    expert: int | None = None
    """Index of the expert in a stacked weight; None for a linear layer."""

    @property
    def norm(self) -> float:
        """||dW||."""
        return float(self.singular_values.norm())

    @property
    def slots_used(self) -> float:
        """exp of the entropy of the squared pool use: the effective number of slots."""
        return _entropy_rank(self.pool_use.square())


@dataclasses.dataclass(frozen=True)
class GroupAnalysis:
    """Layers that share a pool, in the model's order."""

    pattern: str
    shape: tuple[int, int]
    """(out, in)"""
    layers: tuple[LayerAnalysis, ...]
    """One entry per layer; for stacked weights one per expert, weight by weight."""
    experts: int = 0
    """Number of experts in each stacked weight; 0 for linear layers."""

    @property
    def pool_use(self) -> Tensor:
        """(L, L*k): use of every slot by every layer."""
        return pad_sequence([layer.pool_use for layer in self.layers], batch_first=True)

    @property
    def weights(self) -> list[tuple[LayerAnalysis, ...]]:
        """Layers by the weight they change: all experts of one weight, or a single layer."""
        size = self.experts or 1
        return [self.layers[i : i + size] for i in range(0, len(self.layers), size)]


def analyze(model: nn.Module) -> list[GroupAnalysis]:
    """Analyze the adapter of a patched model: spectrum and pool use of each layer.

    dW = [B | B_pool] diag(d) [A ; A_pool] is defined in arXiv 2503.12576, section 3. All values are
    computed in float64 from the factors. Each adapted expert is analyzed separately.

    Args:
        model: a patched model.

    Returns:
        One entry per group of layers that share a pool.

    Raises:
        TypeError, ValueError: the model is not patched.

    Example:
        >>> from rasa_ext.analysis import analyze
        >>> groups = analyze(rasa_ext.patch_model(model, rank=8, k=1))
        >>> groups[0].pattern, groups[0].pool_use.shape  # (L, L*k)
        ('model.layers.*.self_attn.q_proj', torch.Size([2, 2]))
        >>> groups[0].layers[0].effective_rank  # not yet trained
        0.0
    """
    plan, layers = patch_state(model).plan, dict(owners(model))
    return [
        _analyze_group(group, {name: layers[name].adapter().factors() for name in group.names})
        for group in plan.groups
    ]


class ShapesUnknown(ValueError):
    """Error for an adapter whose files lack layer shapes, so that the base model is needed."""


def analyze_adapter(
    directory: str | os.PathLike[str], model: nn.Module | None = None
) -> list[GroupAnalysis]:
    """Analyze an adapter that ``save_adapter`` wrote; most need no base model.

    Args:
        directory: what ``save_adapter`` wrote.
        model: the base, for names and shapes; it may be on the meta device. Needed for methods
            whose files do not hold an A and a B of every layer.

    Returns:
        One entry per group of layers that share a pool.

    Raises:
        FileNotFoundError, ValueError: it is not an adapter of this package, or ``model`` is needed
            and is missing or the wrong one.

    Example:
        >>> from rasa_ext.analysis import analyze_adapter
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> rasa_ext.save_adapter(model, "adapter")
        >>> [group.pattern for group in analyze_adapter("adapter")]
        ['model.layers.*.mlp.down_proj']
    """
    groups = factors_by_group(*read_adapter(directory), directory, model)
    return [_analyze_group(group, factors) for group, factors in groups]


def factors_by_group(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
) -> list[tuple[Group, dict[str, Factors]]]:
    """Return an adapter's groups with the factors of each layer, by the method's formula.

    Args:
        settings: the content of ``adapter_config.json``.
        tensors: the weights, as ``rasa_ext.checkpoint.read_adapter`` returns both.
        directory: where they are from, for errors.
        model: the base, as in ``analyze_adapter``.

    Returns:
        Groups, and ``rasa_ext.methods.Factors`` by name of the layer.

    Raises:
        ValueError: as ``analyze_adapter``.

    Example:
        >>> from rasa_ext.analysis import factors_by_group
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> rasa_ext.save_adapter(model, "adapter")
        >>> settings, tensors = rasa_ext.checkpoint.read_adapter("adapter")
        >>> ((group, factors),) = factors_by_group(settings, tensors, "adapter")
        >>> {own.rank for own in factors.values()}
        {9}
    """
    config = as_saved(read_method(settings))
    if model is None:
        shapes = _shapes(tensors, config.method, directory)
        groups = groups_of(shapes, config.grouping_of_experts, config.layer_groups)
    else:
        found = survey(model)
        config = resolve_config(model, config, found)
        groups = make_plan(model, config, found=found).groups
    try:
        return [(group, _factors(tensors, config, group)) for group in groups]
    except (LookupError, RuntimeError) as error:
        raise ValueError(
            f"model: expected the base that {directory} was trained on, and all of the adapter's "
            f"tensors, but they do not fit together ({error})."
        ) from error


def _shapes(
    tensors: Mapping[str, Tensor], method: str, directory: str | os.PathLike[str]
) -> dict[str, tuple[int, ...]]:
    """Return the layers' shapes, from the A and B of each, in the model's order."""
    names = [key.removesuffix("A") for key in tensors if key.endswith(".rasa_A")]
    names = [name for name in sorted(names, key=_in_model_order) if f"{name}B" in tensors]
    if any(tensors[f"{name}{side}"].dim() < 2 for name in names for side in "AB"):
        raise ValueError(f"{directory}: expected rasa_A and rasa_B of two or three dimensions.")
    if not names and method == OFFICIAL:
        raise ValueError(
            f"{directory}: expected an adapter that rasa_ext.save_adapter wrote, found no rasa_A "
            "and rasa_B of any layer in its weights; import other formats first."
        )
    if not names:
        raise ShapesUnknown(
            f"{directory}: the files of the method {method!r} do not contain the shapes of all "
            "layers; pass the base as model."
        )
    return {
        name.removeprefix(PREFIX).removesuffix(".rasa_"): (
            *tensors[f"{name}B"].shape[:-1],
            tensors[f"{name}A"].shape[-1],
        )
        for name in names
    }


def analyze_lora(directory: str | os.PathLike[str]) -> list[GroupAnalysis]:
    """Analyze a plain LoRA in PEFT's format; no base model is needed.

    dW = scale * B A, where scale is alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA. There
    is no pool: all of the change is private.

    Args:
        directory: a directory with ``adapter_config.json`` and the weights.

    Returns:
        One entry per group of layers that would share a pool: one name pattern and one shape.

    Raises:
        FileNotFoundError, ValueError: it is not a plain LoRA of linear layers; the message says
            what to do.

    Example:
        >>> from rasa_ext.analysis import analyze_lora
        >>> model = rasa_ext.patch_model(model, rank=8, k=1, target_modules=["down_proj"])
        >>> _ = rasa_ext.export_lora(model, "lora")
        >>> [group.pattern for group in analyze_lora("lora")]
        ['model.layers.*.mlp.down_proj']
    """
    lora = read_lora(directory)
    shapes = {name: lora.shapes[name] for name in sorted(lora.shapes, key=_in_model_order)}
    return [
        _analyze_group(group, {name: _scaled(lora, name) for name in group.names})
        for group in groups_of(shapes)
    ]


def _scaled(lora: Lora, name: str) -> Factors:
    B, A = lora.factors[name]
    d = torch.full((A.shape[0],), lora.scales[name], dtype=torch.float64)
    return Factors(A, None, B, None, d)


def _factors(
    tensors: Mapping[str, Tensor], config: AdapterConfig, group: Group
) -> dict[str, Factors]:
    """Return a group's factors by layer name; the pool is stored under one of the layers."""
    pools = (_under(tensors, pool_key(member, "")) for member in group.names)
    pool, factors, planned = next(filter(None, pools), {}), {}, group.planned(config)
    for spec in group.specs(torch.device("cpu")):
        own, meant = _under(tensors, own_key(spec.name, "")), planned[spec.name]
        for given, expected in ((own, meant.own), (pool, meant.pool)):
            if any(n not in given or given[n].shape != t.shape for n, t in expected.items()):
                raise LookupError(f"those of {spec.name!r} have other names or shapes")
        factors[spec.name] = config.factors(own, pool, spec)
    return factors


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _analyze_group(group: Group, factors: Mapping[str, Factors]) -> GroupAnalysis:
    experts: Sequence[int | None] = range(group.experts) or (None,)
    layers = (_analyze_layer(n, own, expert) for n, own in factors.items() for expert in experts)
    return GroupAnalysis(group.pattern, group.shape, tuple(layers), group.experts)


@torch.no_grad()
def _analyze_layer(name: str, factors: Factors, expert: int | None) -> LayerAnalysis:
    factors = factors if expert is None else factors.of_expert(expert)
    A, A_pool, B, B_pool, d = factors.map(lambda t: t.double().contiguous())
    if d is None:  # a method without a diagonal
        d = A.new_ones(factors.rank)
    own, use, pooled = A.shape[0], d.new_zeros(0), 0.0
    private = _singular_values(B * d[:own], A).square().sum().item()
    if A_pool is not None and B_pool is not None:
        use = d[own:].abs() * A_pool.norm(dim=1) * B_pool.norm(dim=0)
        pooled = _singular_values(B_pool * d[own:], A_pool).square().sum().item()
        A, B = torch.cat([A, A_pool]), torch.cat([B, B_pool], 1)
    S = _singular_values(B * d, A)
    share = private / (private + pooled) if private + pooled else 0.0
    return LayerAnalysis(name, S.cpu(), _entropy_rank(S), share, use.cpu(), expert)


def _singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Return the singular values of left (out, n) times right (n, in)."""
    R, T = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.t(), mode="r").R
    values: Tensor = torch.linalg.svdvals(R @ T.t())
    return values


def _entropy_rank(values: Tensor) -> float:
    """Return exp of the entropy of normalized values >= 0; 0 if all are zero."""
    total = values.sum()
    return math.exp(torch.special.entr(values / total).sum().item()) if total > 0 else 0.0


def _in_model_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
