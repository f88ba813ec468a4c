"""Make plots and tables of results/errors.csv.

python -m research.experiments.reconstruction.figures
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.records import table as markdown
from rasa_research.solver.plots import panels_for
from research.experiments.reconstruction.finetune import RESULTS
from research.experiments.reconstruction.reconstruct import (
    COLUMNS,
    CURVE,
    INITS,
    LONG,
    RANKS,
    SWEEP,
    Key,
)
from research.experiments.table import Table

Curves = dict[Key, dict[int, float]]
"""The relative error of every run, by iteration."""

_LOOK = {"svd": ("tab:blue", "-"), "random": ("tab:orange", "--")}
_COLOURS = dict(zip(RANKS, ("tab:blue", "tab:green", "tab:purple"), strict=True))


def curves(rows: Iterable[Mapping[str, str]]) -> tuple[Curves, dict[tuple[str, int], float]]:
    """Return the curves of a table's runs, and LoRA's minimum by (module, rank)."""
    found: Curves = {}
    lora: dict[tuple[str, int], float] = {}
    for row in rows:
        key = Key(row["module"], int(row["rank"]), int(row["k"]), row["init"])
        lora[key.module, key.rank] = float(row["lora_error"])
        found.setdefault(key, {})[int(row["iteration"])] = float(row["error"])
    return found, lora


def against_k(found: Curves, module: str, rank: int, init: str) -> dict[int, float]:
    """Return the error by k after ``SWEEP`` iterations, or for k = 0 after the only iteration."""
    result = {}
    for key, errors in found.items():
        if (key.module, key.rank, key.init) == (module, rank, init):
            last = min(max(errors), SWEEP)
            if last == SWEEP or not key.k:
                result[key.k] = errors[last]
    return dict(sorted(result.items()))


def draw_iterations(found: Curves, lora: Mapping[tuple[str, int], float], path: Path) -> None:
    """Plot error against iteration, one panel per module type."""
    rank, k, last = CURVE
    modules = [m for m in _modules(found) if any((m, rank, k, i) in found for i in INITS)]
    figure, panels = panels_for(len(modules))
    for axes, module in zip(panels, modules, strict=True):
        for init, (colour, line) in _LOOK.items():
            errors = found.get(Key(module, rank, k, init), {})
            axes.plot(*_points(errors), line, color=colour, label=f"RaSA, {init}")
        axes.axhline(lora[module, rank], color="black", linewidth=0.8, label="LoRA's minimum")
        # A random start begins above 1, but the starts differ visibly only at lower errors.
        axes.set_xlim(0, last)
        axes.set_ylim(top=min(1.0, 1.15 * lora[module, rank]))
        axes.set(title=f"{module}, r={rank}, k={k}", xlabel="iteration", ylabel="relative error")
        axes.legend(fontsize=7)
    figure.savefig(path)


def draw_k(found: Curves, lora: Mapping[tuple[str, int], float], path: Path) -> None:
    """Plot error over LoRA's minimum against k, one panel per module type."""
    modules = _modules(found)
    figure, panels = panels_for(len(modules))
    for axes, module in zip(panels, modules, strict=True):
        for rank, colour in _COLOURS.items():
            for init, (_, line) in _LOOK.items():
                errors = against_k(found, module, rank, init)
                ratios = [error / lora[module, rank] for error in errors.values()]
                label = f"r={rank}, {init}"
                axes.plot(list(errors), ratios, line, marker=".", color=colour, label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=module, xlabel="k", ylabel="error / LoRA's minimum")
        axes.legend(fontsize=6)
    figure.savefig(path)


def summary(found: Curves, lora: Mapping[tuple[str, int], float]) -> list[dict[str, object]]:
    """Make a table of error over LoRA's minimum by r, start and k: mean, lowest and highest."""
    rows = []
    for rank in RANKS:
        for init in INITS:
            row: dict[str, object] = {"r": rank, "start": init}
            for k in sorted({key.k for key in found}):
                ratios = [
                    errors[k] / lora[module, rank]
                    for module in _modules(found)
                    if k in (errors := against_k(found, module, rank, init))
                ]
                if ratios:
                    mean = sum(ratios) / len(ratios)
                    shown = f"{mean:.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
                    row[f"k={k}"] = shown if len(ratios) > 1 else f"{mean:.3f}"
            if len(row) > 2:
                rows.append(row)
    return rows


def by_iteration(found: Curves, lora: Mapping[tuple[str, int], float]) -> list[dict[str, object]]:
    """Make a table of error over LoRA's minimum by iteration, one row per module type and start."""
    rank, k, last = CURVE
    rows = []
    for module in _modules(found):
        for init in INITS:
            errors = found.get(Key(module, rank, k, init))
            if errors is None:
                continue
            row: dict[str, object] = {"module": module, "start": init}
            row["LoRA's minimum"] = f"{lora[module, rank]:.4f}"
            for iteration in (0, 1, 5, 15, last, LONG[1]):
                if iteration in errors:
                    row[f"after {iteration}"] = f"{errors[iteration] / lora[module, rank]:.4f}"
            rows.append(row)
    return rows


def _points(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(values), list(values.values())


def _modules(found: Curves) -> list[str]:
    return list(dict.fromkeys(key.module for key in found))


def main() -> None:
    """Draw the plots and print the tables as markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of errors.csv")
    given = parser.parse_args()
    rows = Table(given.results / "errors.csv", COLUMNS).rows()
    if not rows:
        raise SystemExit(f"{given.results / 'errors.csv'} has no rows: run reconstruct first")
    found, lora = curves(rows)
    draw_iterations(found, lora, given.results / "iterations.png")
    draw_k(found, lora, given.results / "k.png")
    print(markdown(by_iteration(found, lora)), markdown(summary(found, lora)), sep="\n\n")


if __name__ == "__main__":
    main()
