"""Make tables and a plot of held-out loss against rank.

python -m research.experiments.known_rank.report > tables.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.records import table as markdown
from rasa_research.solver.plots import new_figure
from research.experiments.compare.config import Config, file_of, of_config, read_config
from research.experiments.compare.report import (
    Row,
    at_best_rates,
    methods_table,
    paired_table,
    print_tasks,
)
from research.experiments.compare.run import COLUMNS
from research.experiments.known_rank.run import CONFIG, RESULTS, TASKS
from research.experiments.table import Table

LOOKS = {"lora": ("LoRA", "C1"), "rasa": ("RaSA, k = r", "C0"), "diagonal": ("RaSA, k = 0", "C2")}


def rank_table(config: Config, rows: Iterable[Row], task: str) -> list[dict[str, object]]:
    """Make a table with a row per rank: held-out losses, and differences seed by seed."""
    rows = list(rows)
    losses = {line["method"]: line["held-out loss"] for line in methods_table(config, rows, task)}
    less = {
        (line["method"], line["less"]): line
        for line in paired_table(config, rows, task)
        if "held-out loss" in line
    }
    ranks = {int(spec.get("options", spec)["rank"]) for spec in config.methods.values()}
    result = []
    for rank in sorted(ranks):
        shared, lora, apart = (
            f"{name}-r{rank}{end}"
            for name, end in (("rasa", f"-k{rank}"), ("lora", ""), ("diagonal", ""))
        )
        to_lora, to_apart = less.get((shared, lora), {}), less.get((shared, apart), {})
        result.append(
            {
                "r": rank,
                "LoRA": losses.get(lora),
                "RaSA, k = 0": losses.get(apart),
                "RaSA, k = r": losses.get(shared),
                "k = r less LoRA": to_lora.get("held-out loss"),
                "lower at": to_lora.get("lower at"),
                "k = r less k = 0": to_apart.get("held-out loss"),
                "forgot, less LoRA": to_lora.get("loss on other text"),
            }
        )
    return result


def draw(config: Config, rows: Iterable[Row], path: Path) -> None:
    """Plot loss against rank, a panel per task, with medians as lines and all seeds as dots."""
    rows = of_config(config, rows)
    tasks = [task for task in config.tasks if any(row["task"] == task for row in rows)]
    figure = new_figure(4.5 * max(len(tasks), 1), 4)
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), place + 1)
        found = at_best_rates(config, rows, task)
        for method, (label, colour) in LOOKS.items():
            points = {
                int(config.methods[name]["options"]["rank"]): [float(r["test_loss"]) for r in runs]
                for name, (_, runs) in found.items()
                if name.startswith(method)
            }
            ranks = sorted(points)
            medians = [statistics.median(points[rank]) for rank in ranks]
            axes.plot(ranks, medians, color=colour, label=label)
            for rank in ranks:
                dots = points[rank]
                axes.plot([rank] * len(dots), dots, ".", color=colour, alpha=0.4)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="rank r", ylabel="held-out loss", title=task)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Draw the plot and print the tables as markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of runs.csv")
    parser.add_argument("--all", action="store_true", help="one row per method, and no plot")
    given = parser.parse_args()
    config = read_config(given.config, TASKS)
    rows = Table(given.results / "runs.csv", COLUMNS).rows()
    if given.all:
        print_tasks(config, rows)
        return
    for task in config.tasks:
        print(f"### {task}\n\n{markdown(rank_table(config, rows, task))}\n")
    draw(config, rows, file_of(given.results, given.config, "loss.png"))


if __name__ == "__main__":
    main()
