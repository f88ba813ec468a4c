"""Pictures: the loss of a run, and what an adapter does to each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rasa_ext.analysis import GroupAnalysis

__all__ = ["panels_for"]


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and held-out loss of metrics.jsonl's rows into a PNG.

    The strong line is a running mean over a twentieth of the steps, the faint one every step.
    """
    steps = [row["step"] for row in rows if "loss" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(
        steps,
        _running_mean(losses, max(1, len(losses) // 20)),
        color="tab:blue",
        label="training",
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss on completion tokens (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_spectra(groups: Sequence[GroupAnalysis], path: Path) -> None:
    """Draw every layer's singular values into a PNG, a panel per group, early layers dark.

    Of stacked weights it is the mean over their experts.
    """
    figure, panels = panels_for(len(groups), "Singular values of each layer's change dW")
    for axes, group in zip(panels, groups, strict=True):
        weights = group.weights
        last = max(len(weights) - 1, 1)
        for i, layers in enumerate(weights):
            values = torch.stack([each.singular_values for each in layers]).mean(0).numpy()
            axes.semilogy(
                range(1, len(values) + 1),
                values,
                color=colormaps["viridis"](i / last),
                linewidth=0.8,
            )
        mean = sum(layer.effective_rank for layer in group.layers) / len(group.layers)
        axes.set_title(f"{_short(group.pattern)}\neffective rank {mean:.1f}", fontsize=8)
        mean_of = "singular value, mean over experts" if group.experts else "singular value"
        axes.set(xlabel="component", ylabel=mean_of)
        if len(weights) > 1:
            colours = ScalarMappable(Normalize(0, last), colormaps["viridis"])
            ticks = sorted({0, last // 2, last})
            figure.colorbar(colours, ax=axes, label="layer of the group", ticks=ticks)
    figure.savefig(path)


def plot_pool_use(groups: Sequence[GroupAnalysis], path: Path) -> None:
    """Draw |d| of layers x slots into a PNG, a heat map per group: who uses whose rank."""
    groups = [group for group in groups if group.pool_use.numel()]
    figure, panels = panels_for(len(groups), "Use of the shared pool by each layer")
    for axes, group in zip(panels, groups, strict=True):
        use = group.pool_use.numpy()
        image = axes.imshow(use, aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
        private = sum(layer.private_share for layer in group.layers) / len(group.layers)
        axes.set_title(f"{_short(group.pattern)}\n{private:.0%} private", fontsize=8)
        rows = "layer, and its experts" if group.experts else "layer of the group"
        axes.set(xlabel="slot of the pool", ylabel=rows)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label="norm of what the slot adds to dW")
    figure.savefig(path)


def new_figure(width: float, height: float) -> Figure:
    """A figure without a display, and without anything global as pyplot would leave."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_for(count: int, title: str = "") -> tuple[Figure, list[Axes]]:
    """Make a figure with panels, up to four in a row.

    Args:
        count: of panels.
        title: of the figure.

    Returns:
        The figure and its panels.

    Example:
        >>> from rasa_ext.commands.plots import panels_for
        >>> figure, panels = panels_for(2, "Errors")
        >>> len(panels)
        2
    """
    columns = min(max(count, 1), 4)
    rows = max(-(-count // columns), 1)
    figure = new_figure(4.2 * columns, 3 * rows + 0.4)
    if title:
        figure.suptitle(title, fontsize=10)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axes in panels:
        axes.tick_params(labelsize=8)
    return figure, panels


def _short(pattern: str, width: int = 46) -> str:
    """The end of a long name, which tells groups apart, at most as wide as a panel."""
    return pattern if len(pattern) <= width else "\u2026" + pattern[1 - width :]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
