"""Plot of the solver's errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rasa_ext.patching import Group
from rasa_research.solver.decompose import Decomposition


def plot_errors(groups: Mapping[Group, Decomposition], path: Path) -> None:
    """Plot error / LoRA's minimum by iteration, one panel per group, into a PNG."""
    figure, panels = panels_for(len(groups), "Error of the adapter, divided by LoRA's minimum")
    for axes, (group, result) in zip(panels, groups.items(), strict=True):
        scale = result.lora_error or 1.0
        ratios = [error / scale for error in result.errors]
        axes.plot(ratios, color="tab:blue", label="RaSA")
        axes.axhline(1, color="tab:orange", linestyle="--", linewidth=1, label="LoRA, same rank")
        # The axis spans at least 0.025, so that equal errors look equal.
        axes.set_ylim(min(*ratios, 0.985) - 0.005, max(*ratios, 1.0) + 0.005)
        title = f"{result.errors[-1]:.4f} of ||dW||\u00b2, LoRA {result.lora_error:.4f}"
        axes.set_title(f"{group.pattern[-46:]}\n{title}", fontsize=8)
        axes.set(xlabel="iteration", ylabel="error / LoRA's minimum")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path)


def new_figure(width: float, height: float) -> Figure:
    """Make a figure without a display and without pyplot's global state."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_for(count: int, title: str = "") -> tuple[Figure, list[Axes]]:
    """Make a figure with ``count`` panels, up to four in a row."""
    columns = min(max(count, 1), 4)
    rows = max(-(-count // columns), 1)
    figure = new_figure(4.2 * columns, 3 * rows + 0.4)
    if title:
        figure.suptitle(title, fontsize=10)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axes in panels:
        axes.tick_params(labelsize=8)
    return figure, panels
