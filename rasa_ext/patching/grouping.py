"""Which layers share a pool: by default those of one name pattern and shape, or as one chooses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping

import torch

from rasa_ext.base_layers.experts import ExpertWeight
from rasa_ext.base_layers.linear import LinearLayer
from rasa_ext.base_layers.survey import base_shape
from rasa_ext.methods.base import AdapterConfig, Groups, LayerSpec
from rasa_ext.nn.adapter import Adapter

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # between two dots, or a dot and an end

Shape = tuple[int, int]
"""(out, in)"""


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that share one pool: one name pattern, or chosen name, and one (out, in) shape."""

    pattern: str
    shape: Shape
    names: tuple[str, ...]
    experts: int = 0
    """How many experts each of them stacks; 0 for linear layers."""

    def specs(self, *devices: torch.device) -> list[LayerSpec]:
        """Describe the layers, with tensors on ``devices``: one for each, or for all."""
        each = zip(self.names, itertools.cycle(devices))
        return [
            LayerSpec(index, len(self.names), *self.shape, device, name, self.experts)
            for index, (name, device) in enumerate(each)
        ]

    def planned(self, config: AdapterConfig) -> dict[str, Adapter]:
        """Give the adapters that a method makes for its layers, by name, on the meta device."""
        specs = self.specs(torch.device("meta"))
        pool = config.group_tensors(specs)
        return {s.name: Adapter(config, config.layer_tensors(s), pool, s) for s in specs}


def pattern(name: str) -> str:
    """Replace the layer index of a module path, the first integer in it, by ``*``.

    Args:
        name: as in ``model.named_modules()``.

    Returns:
        The name that layers of one kind have in common.

    Example:
        >>> rasa_ext.patching.pattern("model.layers.3.mlp.up_proj")
        'model.layers.*.mlp.up_proj'
    """
    return _INDEX.sub("*", name, count=1)


def every_index(name: str) -> str:
    """Replace every integer of a module path by ``*``."""
    return _INDEX.sub("*", name)


def groups_of(
    shapes: Mapping[str, tuple[int, ...]], experts: str | None = None, groups: Groups = ()
) -> tuple[Group, ...]:
    """Group layers in the order in which they begin a group, linear layers first.

    Args:
        shapes: (out, in) of linear layers by name, (experts, out, in) of stacked weights.
        experts: the grouping of the latter; with "layer" each is a group of its own.
        groups: of a config.
    """
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in sorted(shapes.items(), key=lambda item: len(item[1])):
        alone = experts == "layer" and len(shape) == 3
        found.setdefault((name if alone else group_of(name, groups), shape), []).append(name)
    return tuple(
        Group(label, (out, width), tuple(names), *stacked)
        for (label, (*stacked, out, width)), names in found.items()
    )


def group_of(name: str, groups: Groups = ()) -> str:
    """Name the group of a layer: as ``groups`` has it, or its name pattern where that has none.

    A layer that is listed by its whole name belongs there, and otherwise to the first pattern that
    its name ends in.
    """
    if callable(groups):
        chosen = groups(name)
        if chosen is not None and not isinstance(chosen, str):
            raise TypeError(
                "groups: expected a callable that gives a group's name, or None for the usual "
                f"one, but for {name!r} it gave {chosen!r}."
            )
        return pattern(name) if chosen is None else chosen
    found = (label for label, items in groups if any(ends_in(name, each) for each in items))
    return _whole_names(groups).get(name) or next(found, pattern(name))


@functools.lru_cache(maxsize=8)
def _whole_names(groups: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, str]:
    return {name: label for label, names in groups for name in names}


def ends_in(name: str, item: str) -> bool:
    """Tell whether a name ends in a pattern, at a dot; ``*`` stands for one part of the name."""
    return _compiled(item).search(name) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(item: str) -> re.Pattern[str]:
    parts = (r"[^.]+" if part == "*" else re.escape(part) for part in item.split("."))
    return re.compile(r"(^|\.)" + r"\.".join(parts) + "$")


def group_layers(
    config: AdapterConfig, bases: Mapping[str, LinearLayer | ExpertWeight], argument: str = "groups"
) -> tuple[Group, ...]:
    """Group the layers that are adapted, by name; ``argument`` is where ``groups`` was given.

    Raises ValueError where a field of the config names layers, and means none of these.
    """
    groups = config.layer_groups
    for item in () if callable(groups) else (item for _, items in groups for item in items):
        if not any(ends_in(name, item) for name in bases):
            known = sorted({every_index(name) for name in bases})
            raise ValueError(
                f"{argument}: expected patterns of adapted layers' names, but none ends in "
                f"{item!r}; they are {', '.join(known[:10])}{', ...' if len(known) > 10 else ''} "
                "('*' stands for one part of a name)."
            )
    config.check_layers(bases)
    shapes = {name: base_shape(base) for name, base in bases.items()}
    return groups_of(shapes, config.grouping_of_experts, groups)


def resolve_groups(config: AdapterConfig, found: Iterable[Group]) -> AdapterConfig:
    """The config with the mapping that a callable in it gave for these groups: that has a file's
    form, and means the same on load.
    """
    if not callable(config.layer_groups):
        return config
    labels: dict[str, list[str]] = {}
    for group in found:
        labels.setdefault(group.pattern, []).extend(group.names)
    return dataclasses.replace(config, groups=labels)
