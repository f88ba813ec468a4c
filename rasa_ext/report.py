"""summary(model): what was matched, how it is grouped, and what was left out."""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import nn

from rasa_ext.record import adapter_parameters, rasa_layers, record_of, unwrap
from rasa_ext.targets import pattern


@dataclasses.dataclass(frozen=True)
class Row:
    """One group of layers that share a pool."""

    pattern: str
    """Their module path, the layer index replaced by ``*``."""
    L: int
    """How many layers the group has."""
    shape: tuple[int, int]
    """(out, in) of each."""
    R: int
    """Effective rank, r - k + L*k."""
    trainable: int
    """Trained numbers of the group, its pool counted once."""


class Summary(list[Row]):
    """The rows, one per group; ``str()`` and ``print`` give a table."""

    left_out: dict[str, str]
    """Linear layers that stay as they are, each with the reason."""
    experts: dict[str, tuple[int, ...]]
    """3-D expert weights, which stay untouched, with their shapes."""
    saved: tuple[str, ...]
    """Modules that are trained in full."""
    adapter: int
    """Numbers of the adapter."""
    trainable: int
    """All trained numbers, those of ``saved`` included."""
    total: int
    """All numbers of the model, the adapter included."""

    def __str__(self) -> str:
        head = ("group", "L", "out x in", "R", "trainable")
        cells = [
            (r.pattern, str(r.L), f"{r.shape[0]} x {r.shape[1]}", str(r.R), f"{r.trainable:,}")
            for r in self
        ]
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *cells)
        ]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(head) - 1)))
        lines.append(
            f"trainable: {self.trainable:,} of {self.total:,} "
            f"({100 * self.trainable / self.total:.3f} %), {self.adapter:,} of them the adapter's"
        )
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        counts = Counter((pattern(name), reason) for name, reason in self.left_out.items())
        lines += [
            f"left out: {name}{f' ({count} layers)' if count > 1 else ''}: {reason}"
            for (name, reason), count in counts.items()
        ]
        if self.experts:
            kinds = Counter((pattern(name), shape) for name, shape in self.experts.items())
            lines += [
                f"untouched: {name} {shape}{f' ({count} layers)' if count > 1 else ''}: "
                "stacked (3-D) weights are not linear layers"
                for (name, shape), count in kinds.items()
            ]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """One row per group of layers: pattern, L, shape (out, in), R, trainable.

    What was left out and why is in ``.left_out``, ``.experts`` and ``.saved``, and in the table.
    """
    plan, layers = record_of(model).plan, dict(rasa_layers(model))
    rows = []
    for group in plan.groups:
        members = [layers[name] for name in group.names]
        pool = members[0].pool
        numbers = sum(m.A.numel() + m.B.numel() + m.d.numel() for m in members)
        if pool is not None:
            numbers += pool.A.numel() + pool.B.numel()
        effective = members[0].d.numel()
        rows.append(Row(group.pattern, len(members), group.shape, effective, numbers))
    result = Summary(rows)
    result.left_out, result.experts, result.saved = plan.left_out, plan.experts, plan.saved
    result.adapter = sum(p.numel() for p in adapter_parameters(model))
    parameters = list(unwrap(model).parameters())
    result.trainable = sum(p.numel() for p in parameters if p.requires_grad)
    result.total = sum(p.numel() for p in parameters)
    return result
