"""Curves of the dev loss over the steps, for every method at its best rate."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rasa_research.solver.plots import new_figure
from research.experiments.compare.config import Config, Key, key_of

Losses = dict[int, list[float]]
"""Losses of all seeds, by step."""


def curve_path(folder: Path, key: Key, settings: str) -> Path:
    """Return the path of a run's curve."""
    name = f"{key.task}-{key.method}-{key.lr!r}-seed{key.seed}-{settings}"
    return folder / "curves" / f"{name}.json"


def losses_of(folder: Path, runs: Iterable[Mapping[str, str]]) -> Losses:
    """Read the losses of runs by step; a run without a file adds none."""
    found: Losses = {}
    for row in runs:
        path = curve_path(folder, key_of(row), row["settings"])
        for point in _curve(path):
            found.setdefault(point["step"], []).append(point["loss"])
    return found


def _curve(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["curve"] if path.is_file() else []


def curve_table(curves: Mapping[str, Losses]) -> list[dict[str, object]]:
    """Make a table of the mean loss by step, one row per method."""
    steps = sorted({step for losses in curves.values() for step in losses})
    return [
        {"method": method}
        | {str(step): statistics.mean(losses[step]) for step in steps if step in losses}
        for method, losses in curves.items()
        if losses
    ]


def draw_curves(config: Config, curves: Mapping[str, Mapping[str, Losses]], path: Path) -> None:
    """Plot the mean loss by step with a band over the seeds, one panel per task."""
    figure = new_figure(7 * max(len(curves), 1), 5)
    for place, (task, methods) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        for index, method in enumerate(config.methods):
            losses = methods.get(method, {})
            steps, colour = sorted(losses), f"C{index % 10}"
            means = [statistics.mean(losses[step]) for step in steps]
            axes.plot(steps, means, color=colour, label=method)
            low, high = ([end(losses[step]) for step in steps] for end in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15)
        axes.set(xlabel="step", ylabel="held-out loss", title=task)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)
