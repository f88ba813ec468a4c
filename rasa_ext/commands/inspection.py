"""``rasa-ext inspect``: describe an adapter by its two files, or plan one for a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rasa_ext.commands.output import command, console, pairs_of, table_of, working
from rasa_ext.commands.parsing import parse_targets

if TYPE_CHECKING:
    from torch import Tensor

    from rasa_ext.analysis import GroupAnalysis


@command
def inspect(
    target: str | None = None,
    *,
    model: str | None = None,
    rank: int = 8,
    k: int | None = None,
    target_modules: str = "all-linear",
    experts: str | None = None,
    spectrum: bool = False,
) -> None:
    """Show an adapter's config, groups and size, or those of a new adapter for a model.

    Args:
        target: Directory of an adapter or a LoRA, or a model's directory or .gguf.
        model: Model to plan an adapter for, in place of a target; it may be on the hub.
        rank: For a model: the new adapter's rank.
        k: For a model: ranks per layer that go to the shared pool. [default: rank // 8]
        target_modules: For a model: as in `rasa-ext finetune`.
        experts: For a model: adapt its experts too; slot, layer or shared, as in finetune.
        spectrum: For an adapter: show the layers' effective ranks and use of the pool instead.
    """
    from rasa_ext.commands.models import is_model
    from rasa_ext.commands.paths import check_adapter

    if (target is None) == (model is None):
        raise ValueError("target: expected an adapter's directory or --model, got both or neither.")
    if target is None or (not spectrum and is_model(Path(target))):
        _show_plan(str(model or target), rank, k, target_modules, experts)
        return
    directory = Path(target)
    check_adapter(directory, "target", " To look at a model of the hub, pass --model.")
    if spectrum:
        _show_spectrum(directory)
    else:
        _show_adapter(directory)


class AdapterGroup(NamedTuple):
    """A group of layers that share a pool, read from an adapter's file.

    ``shape`` is (out, in), and ``private`` and ``pooled`` are numbers of ranks, private per layer.
    ``experts`` is the number of experts in each stacked weight, 0 for linear layers.
    """

    pattern: str
    layers: int
    shape: tuple[int, int]
    private: int
    pooled: int
    parameters: int
    experts: int


def read_groups(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[AdapterGroup], list[str]]:
    """Return the groups of an adapter's layers, and the names of all other tensors.

    The others belong to modules trained in full, or to layers without an A and a B.
    """
    from rasa_ext.checkpoint.files import PREFIX
    from rasa_ext.methods.base import checked_groups
    from rasa_ext.patching.grouping import groups_of

    layers: dict[str, dict[str, Tensor]] = {}
    names = {}
    for key in tensors:
        if found := re.fullmatch(r"(.+)\.(?:rasa_(\w+)|lora_([AB])\.weight)", key):
            name, ours, theirs = found.groups()
            names[key] = name.removeprefix(PREFIX)
            layers.setdefault(names[key], {})[ours or theirs] = tensors[key]
    layers = {name: parts for name, parts in layers.items() if {"A", "B"} <= parts.keys()}
    other = [key for key in tensors if names.get(key) not in layers]
    shapes = {name: (*p["B"].shape[:-1], p["A"].shape[-1]) for name, p in layers.items()}
    chosen = checked_groups(config.get("rasa_groups"))
    groups = []
    for group in groups_of(shapes, config.get("rasa_experts"), chosen):
        parts = [layers[name] for name in group.names]
        pool = parts[0].get("pool_A")
        ranks = parts[0]["A"].shape[-2], 0 if pool is None else pool.shape[-2]
        count = _numbers(tensor for each in parts for tensor in each.values())
        groups.append(
            AdapterGroup(group.pattern, len(parts), group.shape, *ranks, count, group.experts)
        )
    return groups, other


def _show_adapter(directory: Path) -> None:
    from rasa_ext.checkpoint.files import WEIGHTS, not_finite, read_config, read_tensors
    from rasa_ext.methods import every_method

    config, tensors = read_config(directory), read_tensors(directory / WEIGHTS)
    groups, other = read_groups(config, tensors)
    settings = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in config.items()
        if value not in (None, [], {})
    }
    kind = str(config.get("rasa_method") or config.get("peft_type"))
    found = every_method().get(kind.lower())
    title = kind if found is None else found.title
    base = config.get("base_model_name_or_path") or "a model without a name"
    console.print(f"An adapter of the method {title} for {base}.", markup=False)
    console.print(pairs_of(settings))
    if groups:
        table = table_of("group", "L", "out x in", "private", "pooled", "R", "parameters")
        for each in groups:
            shape, rank = _shape(each.shape, each.experts), each.private + each.pooled
            numbers = (each.layers, shape, each.private, each.pooled, rank, f"{each.parameters:,}")
            table.add_row(each.pattern, *map(str, numbers))
        console.print(table)
    if other:
        shown = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in other[:4])
        more = f", and {len(other) - 4} more" if len(other) > 4 else ""
        console.print(f"other tensors: {shown}{more}", markup=False)
    if wrong := list(not_finite(tensors)):
        console.print(
            f"{len(wrong)} tensors hold NaN or infinity, such as {wrong[0]}: the training run "
            "diverged.",
            style="yellow",
            markup=False,
        )
    count = _numbers(tensors.values())
    size = (directory / WEIGHTS).stat().st_size
    console.print(f"{count:,} parameters, {size:,} bytes ({size / 2**20:.2f} MiB)")


def _numbers(tensors: Iterable[Tensor]) -> int:
    """Count the elements, except integers, which only select ranks or features."""
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def _show_spectrum(directory: Path) -> None:
    with working(f"Taking the singular values of {directory}"):
        groups = _analyzed(directory)
    headings = ("L", "out x in", "R", "effective rank", "private", "slots used", "||dW||")
    table = table_of("group", *headings)
    for group in groups:
        layers = group.layers
        ranks = [layer.effective_rank for layer in layers]
        table.add_row(
            group.pattern,
            str(len(group.weights)),
            _shape(group.shape, group.experts),
            str(len(layers[0].singular_values)),
            f"{_mean(ranks):.1f} ({min(ranks):.1f}-{max(ranks):.1f})",
            f"{_mean([layer.private_share for layer in layers]):.0%}",
            f"{_mean([layer.slots_used for layer in layers]):.1f} of {group.pool_use.shape[1]}",
            f"{_mean([layer.norm for layer in layers]):.3g}",
        )
    console.print(table)
    over = "layers and experts" if any(group.experts for group in groups) else "layers"
    console.print(f"Means over {over}.")


def _analyzed(directory: Path) -> list[GroupAnalysis]:
    """Analyze an adapter by its files, and by the base's config if the files lack some shapes."""
    from rasa_ext.analysis import ShapesUnknown, analyze_adapter

    try:
        return analyze_adapter(directory)
    except ShapesUnknown:
        from rasa_ext.commands.models import base_skeleton

        return analyze_adapter(directory, base_skeleton(directory, None))


def _show_plan(
    name: str, rank: int, k: int | None, target_modules: str, experts: str | None
) -> None:
    from rasa_ext import patch_model, summary
    from rasa_ext.commands.models import load_skeleton

    model, targets = load_skeleton(name), parse_targets(target_modules)
    patch_model(model, rank=rank, k=k, target_modules=targets, experts=experts)
    report = summary(model)
    console.print(f"A new adapter for this {type(model).__name__}:")
    console.print(str(report), markup=False)
    console.print(f"Its file would take {4 * report.adapter / 2**20:.1f} MiB.")


def _shape(shape: tuple[int, int], experts: int) -> str:
    """Format (out, in), with the number of experts in front if there are any."""
    return " x ".join(map(str, (experts, *shape) if experts else shape))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
