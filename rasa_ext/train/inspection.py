"""Inspects an adapter directory, from its two files: no base model needed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasa_ext.analysis import (
    GroupAnalysis,
    LayerAnalysis,
    ShapesUnknown,
    analyze_adapter,
    analyze_lora,
)
from rasa_ext.checkpoint.files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    not_finite,
    read_config,
    read_tensors,
)
from rasa_ext.methods.base import Groups, checked_groups
from rasa_ext.patching.grouping import groups_of, pattern


@dataclass(frozen=True)
class AdapterGroup:
    """Layers that share a pool."""

    pattern: str
    layers: int
    shape: tuple[int, int]
    """(out, in)"""
    private: int
    """Ranks of each layer's own."""
    pooled: int
    """Ranks in the pool."""
    parameters: int
    """Trainable parameters of the group."""
    experts: int = 0
    """How many experts each of its stacked weights has; 0 for linear layers."""


@dataclass(frozen=True)
class AdapterContents:
    """An adapter directory."""

    config: dict[str, Any]
    groups: list[AdapterGroup]
    other: dict[str, tuple[int, ...]]
    """Tensors that are not RaSA's: fully trained modules, or another kind of adapter."""
    not_finite: tuple[str, ...]
    """Tensors that hold NaN, or infinity among an adapter's factors."""
    parameters: int
    """Numbers in the file, without those that choose ranks or features."""
    file_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Two adapters' mean effective ranks of one kind of layer."""

    kind: str
    """The layers' name, but for the layer's index."""
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """The first over the second; NaN where the second has changed nothing."""
        return self.first / self.second if self.second else math.nan


def is_adapter(path: Path) -> bool:
    """Tell whether a path is an adapter directory of some kind."""
    return (path / CONFIG).is_file()


def is_model(path: Path) -> bool:
    """Tell whether a path is a model on this machine: a directory of one, or a .gguf file."""
    if path.suffix == ".gguf":
        return path.is_file()
    return (path / "config.json").is_file() and not is_adapter(path)


def check_adapter(path: Path, argument: str = "adapter", otherwise: str = "") -> None:
    """Raise FileNotFoundError, with what is there of that name, where there is no adapter.

    The hub is not asked: what is on it has to be called a model. ``otherwise`` ends the message.
    """
    if is_adapter(path):
        return
    beside = [each.name for each in path.absolute().parent.glob("*") if is_adapter(each)]
    near = [path.parent / name for name in difflib.get_close_matches(path.name, beside, n=1)]
    what = f"{path} holds no {CONFIG}" if path.is_dir() else f"{path} does not exist"
    if path.is_file():
        what, near = f"{path} is a file", [path.parent] if is_adapter(path.parent) else near
    hint = f"; did you mean {near[0]}?" if near else "."
    raise FileNotFoundError(
        f"{argument}: expected an adapter's directory, but {what}{hint}{otherwise}"
    )


def read_adapter(directory: Path) -> AdapterContents:
    """Read config and shapes. Raises FileNotFoundError or ValueError as `load_adapter` does."""
    config = read_config(directory)
    path = directory / WEIGHTS
    tensors = read_tensors(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    numbers = {key: tensor.numel() for key, tensor in tensors.items() if tensor.is_floating_point()}
    chosen = checked_groups(config.get("rasa_groups"))
    groups, used = _groups(shapes, numbers, config.get("rasa_experts"), chosen)
    return AdapterContents(
        config=config,
        groups=groups,
        other={key: shape for key, shape in shapes.items() if key not in used},
        not_finite=tuple(not_finite(tensors)),
        parameters=sum(numbers.values()),
        file_bytes=path.stat().st_size,
    )


def compare_adapters(first: Path, second: Path) -> list[Comparison]:
    """Compare two adapters, RaSA's or plain LoRAs, by the kinds of layers that both have.

    The last entry, "all of these", is of the layers of those kinds together. Raises ValueError
    where there is no such kind, and what reading an adapter raises.
    """
    one, other = (_by_kind(directory) for directory in (first, second))
    both = [kind for kind in one if kind in other]
    if not both:
        raise ValueError(
            f"compare: expected adapters of the same kinds of layers, but {first} has "
            f"{', '.join(list(one)[:3])} and {second} has {', '.join(list(other)[:3])}."
        )
    found = [Comparison(kind, _mean_rank(one[kind]), _mean_rank(other[kind])) for kind in both]
    together = (_mean_rank([each for kind in both for each in of[kind]]) for of in (one, other))
    return [*found, Comparison("all of these", *together)]


def groups_in(directory: Path) -> list[GroupAnalysis]:
    """Analyze an adapter by its files and, where these do not tell all shapes, its base's config.

    Raises what `analyze_adapter` and `load_skeleton` raise.
    """
    try:
        return analyze_adapter(directory)
    except ShapesUnknown:
        from rasa_ext.train.model_loading import base_skeleton

        return analyze_adapter(directory, base_skeleton(directory, None))


def _by_kind(directory: Path) -> dict[str, list[LayerAnalysis]]:
    check_adapter(directory)
    plain = read_config(directory).get("peft_type") == "LORA"
    kinds: dict[str, list[LayerAnalysis]] = {}
    for group in (analyze_lora if plain else groups_in)(directory):
        for layer in group.layers:
            kinds.setdefault(pattern(layer.name), []).append(layer)
    return kinds


def _mean_rank(layers: Sequence[LayerAnalysis]) -> float:
    return sum(layer.effective_rank for layer in layers) / len(layers)


def _groups(
    shapes: dict[str, tuple[int, ...]],
    numbers: dict[str, int],
    experts: str | None,
    chosen: Groups,
) -> tuple[list[AdapterGroup], set[str]]:
    layers = {
        name: (*shapes[f"{PREFIX}{name}.rasa_B"][:-1], shapes[key][-1])
        for key in shapes
        if key.endswith(".rasa_A") and f"{key[:-1]}B" in shapes
        for name in [key.removesuffix(".rasa_A").removeprefix(PREFIX)]
    }
    groups, used = [], set()
    for group in groups_of(layers, experts, chosen):
        names = {f"{PREFIX}{name}" for name in group.names}
        keys = [key for key in shapes if key.rpartition(".rasa_")[0] in names]
        used.update(keys)
        first = f"{PREFIX}{group.names[0]}"
        private = shapes[f"{first}.rasa_A"][-2]
        pooled = shapes.get(f"{first}.rasa_pool_A", (0, 0))[-2]
        count = sum(numbers.get(key, 0) for key in keys)
        sizes = len(group.names), group.shape, private, pooled, count, group.experts
        groups.append(AdapterGroup(group.pattern, *sizes))
    return groups, used
