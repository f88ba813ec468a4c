"""Grouping of layers that share a pool: by name pattern and shape, or by ``groups``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Mapping

import torch

from rasa_ext.base_layers.survey import Base
from rasa_ext.methods.base import AdapterConfig, Groups
from rasa_ext.nn.adapter import Adapter, LayerSpec
from rasa_ext.nn.packs import PackSet

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # between two dots, or a dot and an end

Shape = tuple[int, int]
"""(out, in)"""


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that share one pool: one name pattern or chosen name, and one (out, in) shape."""

    pattern: str
    shape: Shape
    names: tuple[str, ...]
    experts: int = 0
    """Number of experts in each stacked weight; 0 for linear layers."""

    def specs(self, *devices: torch.device) -> list[LayerSpec]:
        """Return a spec per layer, with tensors on ``devices``: one per layer, or one for all."""
        layers = zip(self.names, itertools.cycle(devices))
        return [
            LayerSpec(index, len(self.names), *self.shape, device, name, self.experts)
            for index, (name, device) in enumerate(layers)
        ]

    def planned(self, config: AdapterConfig) -> dict[str, Adapter]:
        """Return the adapters that the method makes for the group, by layer name, on meta."""
        specs = self.specs(torch.device("meta"))
        pool, packs = config.group_tensors(specs), PackSet()
        return {
            spec.name: Adapter(config, config.layer_tensors(spec), pool, spec, None, packs)
            for spec in specs
        }


def shape_text(shape: Shape, experts: int) -> str:
    """Format (out, in), with the number of experts in front if there are any."""
    return " x ".join(map(str, (experts, *shape) if experts else shape))


def pattern(name: str, which: int = 0) -> str:
    """Replace an integer in a module path, by default the first, by ``*``.

    Args:
        name: a name from ``model.named_modules()``.
        which: the place of the layer index among the integers.

    Returns:
        The name pattern of the layer.

    Example:
        >>> rasa_ext.patching.pattern("model.layers.3.mlp.up_proj")
        'model.layers.*.mlp.up_proj'
    """
    for match in itertools.islice(_INDEX.finditer(name), which, which + 1):
        name = f"{name[: match.start()]}*{name[match.end() :]}"
    return name


def every_index(name: str) -> str:
    """Replace every integer of a module path by ``*``."""
    return _INDEX.sub("*", name)


def groups_of(
    shapes: Mapping[str, tuple[int, ...]], experts: str | None = None, groups: Groups = ()
) -> tuple[Group, ...]:
    """Group layers by name and shape, linear layers first, in order of each group's first layer.

    The layer index is the first integer that varies among the names of one `every_index`.

    Args:
        shapes: (out, in) of linear layers by name, (experts, out, in) of stacked weights.
        experts: how stacked weights are grouped; with "layer" each one is a group.
        groups: ``groups`` of the config.
    """
    members: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    indices: dict[str, list[list[str]]] = {}
    for name in shapes:
        indices.setdefault(every_index(name), []).append(_INDEX.findall(name))
    varying = {
        form: next((i for i, each in enumerate(zip(*rows, strict=True)) if len({*each}) > 1), 0)
        for form, rows in indices.items()
    }
    for name, shape in sorted(shapes.items(), key=lambda item: len(item[1])):
        alone = experts == "layer" and len(shape) == 3
        label = name if alone else group_of(name, groups, varying[every_index(name)])
        members.setdefault((label, shape), []).append(name)
    return tuple(
        Group(label, (out, width), tuple(names), *stacked)
        for (label, (*stacked, out, width)), names in members.items()
    )


def group_of(name: str, groups: Groups = (), which: int = 0) -> str:
    """Return the name of a layer's group: from ``groups``, else the ``pattern``.

    An entry with the whole name of the layer comes first, then the first pattern that the name
    ends in.
    """
    if callable(groups):
        chosen = groups(name)
        if chosen is not None and not isinstance(chosen, str):
            raise TypeError(
                "groups: expected a callable that returns a group's name, or None for the default "
                f"group, but for {name!r} it returned {chosen!r}."
            )
        return pattern(name, which) if chosen is None else chosen
    labels = (label for label, items in groups if any(ends_in(name, item) for item in items))
    return _whole_names(groups).get(name) or next(labels, pattern(name, which))


@functools.lru_cache(maxsize=8)
def _whole_names(groups: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, str]:
    return {name: label for label, names in groups for name in names}


def ends_in(name: str, item: str) -> bool:
    """Return whether a name ends in a pattern, at a dot; ``*`` matches one part of the name."""
    return _compiled(item).search(name) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(item: str) -> re.Pattern[str]:
    parts = (r"[^.]+" if part == "*" else re.escape(part) for part in item.split("."))
    return re.compile(r"(^|\.)" + r"\.".join(parts) + "$")


def group_layers(
    config: AdapterConfig, bases: Mapping[str, Base], argument: str = "groups"
) -> tuple[Group, ...]:
    """Group the adapted layers, given by name.

    ``argument`` is the name of ``groups`` in errors. Raises ValueError if a field of the config
    names layers and matches none of these.
    """
    groups = config.layer_groups
    for item in () if callable(groups) else (item for _, items in groups for item in items):
        if not any(ends_in(name, item) for name in bases):
            known = sorted({every_index(name) for name in bases})
            raise ValueError(
                f"{argument}: expected patterns that match ends of adapted layers' names, but none "
                f"ends in {item!r}; the names are {', '.join(known[:10])}"
                f"{', ...' if len(known) > 10 else ''} ('*' stands for one part of a name)."
            )
    config.check_layers(bases)
    shapes = {name: base.shape for name, base in bases.items()}
    return groups_of(shapes, config.grouping_of_experts, groups)


def as_saved(config: AdapterConfig) -> AdapterConfig:
    """Return a file's config for patching: without groups, the first integer is the index."""
    return config if config.layer_groups else dataclasses.replace(config, groups=pattern)


def resolve_groups(config: AdapterConfig, planned: Collection[Group]) -> AdapterConfig:
    """Return the config with ``groups`` as a file has them, which then give these groups.

    A callable, and an index that is not the first integer, become the mapping that they gave.
    """
    given, alone = config.layer_groups, config.grouping_of_experts == "layer"
    chosen = () if callable(given) else [label for label, _ in given]
    if all(
        (alone and group.experts) or group.pattern in (pattern(name), *chosen)
        for group in planned
        for name in group.names
    ):
        return dataclasses.replace(config, groups=()) if callable(given) else config
    labels: dict[str, list[str]] = {}
    for group in planned:
        labels.setdefault(group.pattern, []).extend(group.names)
    return dataclasses.replace(config, groups=labels)
