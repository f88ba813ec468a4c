"""``summary(model)``: the adapted layers, their groups, and what was left out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch import nn

from rasa_ext.base_layers.layouts import Format, quantized_stack
from rasa_ext.base_layers.quantized import format_of
from rasa_ext.patching.grouping import pattern, shape_text
from rasa_ext.patching.state import adapter_parameters, owners, patch_state, unwrap


@dataclasses.dataclass(frozen=True)
class Row:
    """One group of layers that share a pool."""

    pattern: str
    """Module path with the layer index replaced by ``*``, or the name from ``groups``."""
    L: int
    """Number of layers in the group."""
    shape: tuple[int, int]
    """(out, in) of each layer."""
    R: int
    """Effective rank, r - k + L*k under RaSA; the largest where layers differ."""
    trainable: int
    """Trainable parameters of the group, with the pool counted once."""
    R_min: int
    """Smallest effective rank of a layer."""
    experts: int = 0
    """Number of experts in each of the L stacked weights; 0 for linear layers."""


class Summary(list[Row]):
    """Rows of the summary, one per group; ``str()`` and ``print`` give a table."""

    skipped: dict[str, str]
    """Linear layers, 1x1 convolutions and expert weights that are not adapted, with the reason."""
    modules_to_save: tuple[str, ...]
    """Modules that are trained in full."""
    tokens: dict[str, tuple[int, ...]]
    """Trained tokens, by the names of all modules that read their rows."""
    groups: dict[str, tuple[str, ...]]
    """Groups set by the argument ``groups``: their names, and the patterns of their layers."""
    formats: dict[str, int]
    """Formats of the quantized layers under adapters, and the number of layers in each."""
    adapter: int
    """Number of parameters of the adapter."""
    trainable: int
    """Number of trainable parameters, with ``modules_to_save``."""
    total: int
    """Number of parameters of the model, with the adapter."""

    def __str__(self) -> str:
        table = [("group", "L", "out x in", "R", "trainable")]
        for r in self:
            shape = shape_text(r.shape, r.experts)
            table.append((r.pattern, str(r.L), shape, _ranks(r), f"{r.trainable:,}"))
        first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
        lines = []
        for name, *cells in table:
            right = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
            lines.append("  ".join([name.ljust(first), *right]))
        lines.insert(1, "-" * len(lines[0]))
        lines.append(
            f"trainable: {self.trainable:,} of {self.total:,} "
            f"({100 * self.trainable / self.total:.3f} %), {self.adapter:,} of them the adapter's"
        )
        lines += [f"quantized: {n} layers in {name}" for name, n in self.formats.items()]
        if self.groups:
            lines.append(f"groups chosen: {', '.join(self.groups)}")
        if self.modules_to_save:
            lines.append(f"trained in full: {', '.join(self.modules_to_save)}")
        lines += [f"trained rows: {len(ids)} of {name}" for name, ids in self.tokens.items()]
        return "\n".join([*lines, *self.left_out()])

    def left_out(self) -> list[str]:
        """Return one line per kind of layer that was skipped, with the reason."""
        counts = Counter((pattern(name), reason) for name, reason in self.skipped.items())
        return [
            f"left out: {name}{f' ({count} layers)' if count > 1 else ''}: {reason}"
            for (name, reason), count in counts.items()
        ]


def summary(model: nn.Module) -> Summary:
    """Summarize a patched model: one row per group of layers that share a pool.

    A row has the group's name pattern (or its name in ``groups``), the number L of layers, their
    shape (out, in), the effective rank R = r-k+L*k (arXiv 2503.12576, section 3) and the number of
    trainable parameters.

    Args:
        model: a patched model.

    Returns:
        A list of rows that prints as a table. ``.skipped`` has what was left out and why,
        ``.modules_to_save`` the modules trained in full, ``.formats`` the formats of quantized
        layers, and ``.adapter``, ``.trainable`` and ``.total`` the parameter counts.

    Raises:
        TypeError, ValueError: the model is no module, or not patched.

    Example:
        >>> result = rasa_ext.summary(rasa_ext.patch_model(model, rank=8, k=1))
        >>> all(row.R == 7 + row.L for row in result)
        True
        >>> sum(row.trainable for row in result) == result.adapter == result.trainable
        True
        >>> table = str(result)
    """
    state, layers = patch_state(model), dict(owners(model))
    plan, chosen = state.plan, state.config.layer_groups
    rows = []
    for group in plan.groups:
        members = [layers[name] for name in group.names]
        tensors = {id(t): t for member in members for t in member.adapter().sources()}
        trainable = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
        ranks = [member.effective_rank for member in members]
        sizes = len(members), group.shape, max(ranks), trainable, min(ranks), group.experts
        rows.append(Row(group.pattern, *sizes))
    result = Summary(rows)
    result.skipped, result.modules_to_save = plan.skipped, plan.modules_to_save
    result.tokens = {", ".join(rows.names): rows.ids for rows in plan.tokens}
    result.groups = {} if callable(chosen) else dict(chosen)
    formats = (_format(unwrap(model), name, layer) for name, layer in layers.items())
    result.formats = dict(Counter(fmt.name for fmt in formats if fmt is not None))
    result.adapter = sum(p.numel() for p in adapter_parameters(model))
    parameters = list(unwrap(model).parameters())
    result.trainable = sum(p.numel() for p in parameters if p.requires_grad)
    result.total = sum(p.numel() for p in parameters)
    return result


def _format(model: nn.Module, name: str, layer: Any) -> Format | None:
    """Return the format of the quantized weight under an adapter, or None."""
    if not layer.spec.experts:
        return format_of(layer.base_layer)
    path, _, key = name.rpartition(".")
    base: Any = model.get_submodule(path)
    stack = quantized_stack(base.base_layer, key)
    return None if stack is None else stack.layout


def _ranks(row: Row) -> str:
    return str(row.R) if row.R_min == row.R else f"{row.R_min}-{row.R}"
