"""``rasa-ext inspect``: describe an adapter by its two files, or plan one for a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rasa_ext.commands.output import command, console, pairs_of, table_of, working
from rasa_ext.commands.parsing import parse_targets

if TYPE_CHECKING:
    from torch import Tensor

    from rasa_ext.ops import Factors
    from rasa_ext.patching.grouping import Group

Item = TypeVar("Item")


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
        model: Model to plan an adapter for, in place of a target; it may be on the hub. With an
            adapter: its base, which some methods need.
        rank: For a model: the new adapter's rank.
        k: For a model: ranks per layer that go to the shared pool. [default: rank // 8]
        target_modules: For a model: as in `rasa-ext sft`.
        experts: For a model: adapt its experts too; slot, layer or shared, as in sft.
        spectrum: For an adapter: show the layers' effective ranks and use of the pool instead.
    """
    from rasa_ext.commands.models import is_model
    from rasa_ext.commands.paths import check_adapter

    if target is None or (not spectrum and is_model(Path(target))):
        if (target is None) == (model is None):
            text = "target: expected an adapter's directory or --model, got both or neither."
            raise ValueError(text)
        _show_plan(str(model or target), rank, k, target_modules, experts)
        return
    directory = Path(target)
    check_adapter(directory, "target", " To look at a model of the hub, pass --model.")
    if spectrum:
        _show_spectrum(directory, model)
    else:
        _show_adapter(directory, model)


class AdapterGroup(NamedTuple):
    """A group of layers that share a pool, read from an adapter's file.

    ``shape`` is (out, in), and ``ranks`` has the layers' numbers of private and pooled ranks.
    ``experts`` is the number of experts in each stacked weight, 0 for linear layers.
    """

    pattern: str
    shape: tuple[int, int]
    ranks: tuple[tuple[int, int], ...]
    parameters: int
    experts: int


def read_groups(
    config: dict[str, Any], tensors: dict[str, Tensor], directory: Path, model: str | None = None
) -> tuple[list[AdapterGroup], list[str]]:
    """Return the groups of an adapter's layers, and the names of all other tensors.

    The others belong to modules trained in full, or to layers without all factors.
    """
    from rasa_ext.checkpoint.files import PREFIX

    keys: dict[str, list[str]] = {}
    for key in tensors:
        if match := re.fullmatch(r"(.+)\.(?:rasa_\w+|lora_[AB]\.weight)", key):
            keys.setdefault(match[1].removeprefix(PREFIX), []).append(key)
    groups, grouped = [], set()
    for group, factors in _factors(config, tensors, directory, model):
        parts = [key for name in factors for key in keys.get(name, ())]
        grouped.update(parts)
        pairs = [(f.A, f.A_pool) for f in factors.values()]
        ranks = tuple((A.shape[-2], 0 if P is None else P.shape[-2]) for A, P in pairs)
        count = _numbers(tensors[key] for key in parts)
        groups.append(AdapterGroup(group.pattern, group.shape, ranks, count, group.experts))
    return groups, [key for key in tensors if key not in grouped]


def _factors(
    config: dict[str, Any], tensors: dict[str, Tensor], directory: Path, model: str | None
) -> list[tuple[Group, dict[str, Factors]]]:
    """Return the groups, from the files if these have all shapes, else from the base."""
    from rasa_ext.analysis import factors_by_group
    from rasa_ext.checkpoint.files import PREFIX
    from rasa_ext.ops import Factors
    from rasa_ext.patching.grouping import groups_of

    if config.get("peft_type") == "RASA":
        read = functools.partial(factors_by_group, config, tensors, directory)
        try:
            return _with_base_if_needed(read, directory, model)
        except ValueError as error:
            if model is not None:
                raise
            console.print(f"No groups: {error}", style="yellow", markup=False)
            return []
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = {
        key.removeprefix(PREFIX).removesuffix(ends[0]): (tensors[key], tensors[other])
        for key in tensors
        if key.endswith(ends[0]) and (other := key.removesuffix(ends[0]) + ends[1]) in tensors
    }
    shapes = {name: (*B.shape[:-1], A.shape[-1]) for name, (A, B) in layers.items()}
    return [
        (g, {n: Factors(layers[n][0], None, layers[n][1], None, None) for n in g.names})
        for g in groups_of(shapes)
    ]


def _show_adapter(directory: Path, model: str | None) -> None:
    from rasa_ext.checkpoint.files import WEIGHTS, not_finite, read_config, read_tensors
    from rasa_ext.methods import every_method
    from rasa_ext.patching.grouping import shape_text

    config, tensors = read_config(directory), read_tensors(directory / WEIGHTS)
    groups, other = read_groups(config, tensors, directory, model)
    settings = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in config.items()
        if value not in (None, [], {})
    }
    kind = str(config.get("rasa_method") or config.get("peft_type"))
    method = every_method().get(kind.lower())
    title = kind if method is None else method.title
    base = config.get("base_model_name_or_path") or "a model without a name"
    console.print(f"An adapter of the method {title} for {base}.", markup=False)
    console.print(pairs_of(settings))
    if groups:
        table = table_of("group", "L", "out x in", "private", "pooled", "R", "parameters")
        for group in groups:
            ranks = map(_span, (*zip(*group.ranks, strict=True), tuple(map(sum, group.ranks))))
            numbers = (len(group.ranks), shape_text(group.shape, group.experts), *ranks)
            table.add_row(group.pattern, *map(str, numbers), f"{group.parameters:,}")
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


def _span(ranks: tuple[int, ...]) -> str:
    """Format equal numbers as one, others as the smallest and the largest."""
    return "-".join(map(str, sorted({min(ranks), max(ranks)})))


def _show_spectrum(directory: Path, model: str | None) -> None:
    from rasa_ext.analysis import analyze_adapter
    from rasa_ext.patching.grouping import shape_text

    with working(f"Taking the singular values of {directory}"):
        read = functools.partial(analyze_adapter, directory)
        groups = _with_base_if_needed(read, directory, model)
    headings = ("L", "out x in", "R", "effective rank", "private", "slots used", "||dW||")
    table = table_of("group", *headings)
    for group in groups:
        layers = group.layers
        ranks = [layer.effective_rank for layer in layers]
        table.add_row(
            group.pattern,
            str(len(group.weights)),
            shape_text(group.shape, group.experts),
            str(len(layers[0].singular_values)),
            f"{fmean(ranks):.1f} ({min(ranks):.1f}-{max(ranks):.1f})",
            f"{fmean([layer.private_share for layer in layers]):.0%}",
            f"{fmean([layer.slots_used for layer in layers]):.1f} of {group.pool_use.shape[1]}",
            f"{fmean([layer.norm for layer in layers]):.3g}",
        )
    console.print(table)
    over = "layers and experts" if any(group.experts for group in groups) else "layers"
    console.print(f"Means over {over}.")


def _with_base_if_needed(
    read: Callable[[Any], list[Item]], directory: Path, model: str | None
) -> list[Item]:
    """Call ``read`` with None, or with the base's modules if the files lack some shapes."""
    from rasa_ext.analysis import ShapesUnknown

    try:
        return read(None)
    except ShapesUnknown:
        from rasa_ext.commands.models import base_skeleton

        return read(base_skeleton(directory, model))


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
