"""Make tables and plots of the comparison.

python -m research.experiments.compare.report > tables.md

Differences are taken seed by seed, with Student's 95 % interval of their mean. An interval that
includes 0 shows no difference. Without any difference, one interval in twenty still excludes 0.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.records import table as markdown
from rasa_research.solver.plots import new_figure
from research.experiments.compare.config import (
    BASE,
    CONFIG,
    REFERENCE,
    RESULTS,
    Config,
    best,
    file_of,
    key_of,
    number,
    of_config,
    only,
    read_config,
)
from research.experiments.compare.curves import curve_table, draw_curves, losses_of
from research.experiments.compare.run import COLUMNS, choose
from research.experiments.table import Table

Row = Mapping[str, str]
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 0.975 quantile of Student's t, for 2 to 10 differences."""
_DIFFERENCES = {
    "held-out loss": ("test_loss", 1, 3),
    "exact match, %": ("exact_match", 100, 0),
    "loss on other text": ("other_text_loss", 1, 3),
}
"""Column of runs.csv, factor and digits, by the title of the column of differences."""
_SHORT = {
    "held-out loss": "loss",
    "exact match, %": "solved, %",
    "loss gained on other text": "forgot",
    "steps": "steps",
    "best": "rate",
    "rates": "rates",
    "seeds": "seeds",
}
"""Short column titles for the table of all tasks."""


def methods_table(
    config: Config,
    rows: Iterable[Row],
    task: str,
    step_times: Mapping[str, str] | None = None,
) -> list[dict[str, object]]:
    """Make a table with one row per method: its best rate by dev loss, and results at that rate.

    Results are means over the seeds, with the standard deviation if there are several. "rates" is
    the progress of the sweep; until it is complete, the best rate may change. ``step_times`` has
    text by method, which is shown unchanged.
    """
    rows = of_config(config, rows)
    base = next((r for r in rows if r["task"] == task and r["method"] == BASE), None)
    result = []
    if base is not None:
        result.append({"method": "before training", **_figures([base], base)})
    found = at_best_rates(config, rows, task)
    several = len({chosen[0]["steps"] for _, chosen in found.values()}) > 1
    for method, (swept, chosen) in found.items():
        result.append(
            {
                "method": method,
                "trainable parameters": f"{int(chosen[0]['trainable']):,}",
                **({"step time": step_times.get(method)} if step_times else {}),
                **({"steps": chosen[0]["steps"]} if several else {}),
                "rates": f"{swept} of {max(swept, len(config.methods[method]['rates']))}",
                "best": f"{float(chosen[0]['lr']):g}",
                "seeds": len(chosen),
                **_figures(chosen, base),
            }
        )
    return result


def summary_table(
    config: Config, rows: Iterable[Row], step_times: Mapping[str, str] | None = None
) -> list[dict[str, object]]:
    """Make one table of all tasks with the columns of `methods_table`, most of them per task."""
    rows, found = list(rows), {}
    for task in config.tasks:
        for line in methods_table(config, rows, task, step_times):
            method = str(line["method"])
            to = found.setdefault(method, {"method": method})
            for name in ("trainable parameters", "step time"):
                if name in line:
                    to.setdefault(name, line[name])
            for name, shown in _SHORT.items():
                if name in line:
                    to[f"{task}: {shown}"] = line[name]
    columns = list(dict.fromkeys(name for line in found.values() for name in line))
    first = [name for name in columns if ":" not in name]
    columns = first + [name for task in config.tasks for name in columns if f"{task}:" in name]
    return [{name: line.get(name) for name in columns} for line in found.values()]


def paired_table(config: Config, rows: Iterable[Row], task: str) -> list[dict[str, object]]:
    """Make a table of differences between methods at their best rates, seed by seed.

    Runs with one seed train on the same rows in the same order, so differences vary less than the
    losses. Pairs with fewer than two common seeds are left out.
    """
    chosen = {
        method: {row["seed"]: row for row in runs if row["test_loss"]}
        for method, (_, runs) in at_best_rates(config, of_config(config, rows), task).items()
    }
    result = []
    for method, runs in chosen.items():
        for against in config.methods[method].get("against", [REFERENCE]):
            reference = chosen.get(against, {})
            seeds = sorted(runs.keys() & reference.keys())
            if method == against or len(seeds) < 2:
                continue
            line: dict[str, object] = {"method": method, "less": against, "seeds": len(seeds)}
            for title, (column, factor, digits) in _DIFFERENCES.items():
                pairs = [(runs[seed][column], reference[seed][column]) for seed in seeds]
                if all(map(all, pairs)):
                    found = [factor * (float(ours) - float(theirs)) for ours, theirs in pairs]
                    line[title] = interval(found, digits)
                    if column == "test_loss":
                        line["lower at"] = f"{sum(d < 0 for d in found)} of {len(found)}"
            result.append(line)
    return result


def interval(differences: list[float], digits: int) -> str:
    """Format the mean of 2 to 10 differences with its 95 % interval."""
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = _STUDENT[len(differences) - 2] * error
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def sweep_table(config: Config, rows: Iterable[Row], task: str) -> list[dict[str, object]]:
    """Make a table of the dev loss with the first seed, by method and rate."""
    have = {key_of(row): row for row in of_config(config, rows)}
    rates = sorted({key.lr for key in have})
    result = []
    for method in config.methods:
        row: dict[str, object] = {"method": method}
        for lr in rates:
            found = have.get((task, method, lr, config.seeds[0]))
            if found is not None:
                row[f"{lr:g}"] = number(found["dev_loss"])
        if len(row) > 1:
            result.append(row)
    columns = ["method", *(f"{lr:g}" for lr in rates if any(f"{lr:g}" in r for r in result))]
    return [{name: row.get(name) for name in columns} for row in result]


def step_table(path: Path) -> list[dict[str, object]]:
    """Make a table of the step times, fastest first; empty if ``step_time`` has not been run."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["seconds"]))
    over = next((name for name in rows[0] if name.startswith("over_")), "") if rows else ""
    return [
        {
            "method": row["method"],
            "seconds a step (quartiles)": (
                f"{float(row['seconds']):.3f} ({float(row['seconds_low']):.3f}-"
                f"{float(row['seconds_high']):.3f})"
            ),
            f"/ {over.removeprefix('over_')}": row[over],
            "trainable parameters": f"{int(row['trainable']):,}",
        }
        for row in rows
    ]


def at_best_rates(
    config: Config, rows: Iterable[Row], task: str
) -> dict[str, tuple[int, list[Row]]]:
    """Return, for every method in ``rows``, the number of rates done and the best rate's runs."""
    rows, result = list(rows), {}
    for method in config.methods:
        runs = [row for row in rows if row["task"] == task and row["method"] == method]
        swept = sum(int(row["seed"]) == config.seeds[0] for row in runs)
        if swept:
            lr = _best_rate(config, runs, task, method)
            result[method] = swept, [row for row in runs if float(row["lr"]) == lr]
    return result


def draw(config: Config, rows: Iterable[Row], path: Path) -> None:
    """Plot loss against rate, and loss against forgetting, one row of panels per task."""
    rows = [row for row in of_config(config, rows) if row["test_loss"]]
    tasks = [task for task in config.tasks if any(row["task"] == task for row in rows)]
    figure = new_figure(11, 4 * max(len(tasks), 1))
    for place, task in enumerate(tasks):
        left = figure.add_subplot(len(tasks), 2, 2 * place + 1)
        right = figure.add_subplot(len(tasks), 2, 2 * place + 2)
        base = next((r for r in rows if r["task"] == task and r["method"] == BASE), None)
        for index, method in enumerate(config.methods):
            runs = [r for r in rows if r["task"] == task and r["method"] == method]
            # There are ten colours; methods from the eleventh on have square markers.
            look = {"color": f"C{index % 10}", "marker": "os"[index // 10 % 2]}
            by_rate: dict[float, list[float]] = {}
            for run in runs:
                by_rate.setdefault(float(run["lr"]), []).append(float(run["test_loss"]))
            points = sorted((lr, statistics.mean(found)) for lr, found in by_rate.items())
            left.plot(*zip(*points, strict=True), label=method, **look) if points else None
            if base is not None:
                forgot = [
                    float(r["other_text_loss"]) - float(base["other_text_loss"]) for r in runs
                ]
                right.plot(forgot, [float(r["test_loss"]) for r in runs], linestyle="", **look)
        left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=task)
        right.set(xlabel="loss gained on other text", ylabel="held-out loss", title=task)
        for axes in (left, right):
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
        right.set_xscale("symlog", linthresh=0.1)  # a rate that is too high forgets by whole nats
        left.legend(fontsize=7)
    figure.savefig(path)


def _best_rate(config: Config, runs: list[Row], task: str, method: str) -> float:
    """Return the best rate of the sweep so far; the best rates are compared by mean over seeds."""
    have = {key_of(row): row for row in runs}
    pair = best(config, have, task, method)
    several = {
        lr: [number(r["dev_loss"]) for r in runs if float(r["lr"]) == lr]
        for lr in (pair or {float(r["lr"]) for r in runs})
    }
    # Only seeds that all these rates have count, so no rate wins by an extra seed.
    seeds = min(len(found) for found in several.values())
    return min(several, key=lambda lr: statistics.mean(several[lr][:seeds]))


def _figures(rows: list[Row], base: Row | None) -> dict[str, object]:
    right = [100 * float(row["exact_match"]) for row in rows if row["exact_match"]]
    figures = {"held-out loss": _spread([number(row["test_loss"]) for row in rows], 3)}
    if right:
        figures["exact match, %"] = _spread(right)
    forgot = [number(r["other_text_loss"]) for r in rows]
    if base is not None:
        forgot = [loss - number(base["other_text_loss"]) for loss in forgot]
    figures["loss gained on other text"] = _spread(forgot, 3)
    return figures


def _spread(values: list[float], digits: int = 0, sign: str = "-") -> str | None:
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def print_tasks(
    config: Config, rows: Iterable[Row], ratios: Mapping[str, str] | None = None
) -> None:
    """Print the tables of every task that has rows."""
    rows = list(rows)
    for task in config.tasks:
        if any(row["task"] == task for row in of_config(config, rows)):
            print(f"### {task}\n")
            print(markdown(methods_table(config, rows, task, ratios)), end="\n\n")
            paired = paired_table(config, rows, task)
            if paired:
                print(f"Differences, seed by seed:\n\n{markdown(paired)}\n")
            sweep = sweep_table(config, rows, task)
            if sweep:
                print("Loss to choose by, first seed, by rate:\n")
                print(markdown(sweep), end="\n\n")


def main() -> None:
    """Draw the plots and print the tables as markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of runs.csv")
    choose(parser)
    given = parser.parse_args()
    config = only(read_config(given.config), given.methods, given.rates)
    rows = Table(given.results / "runs.csv", COLUMNS).rows()
    if not of_config(config, rows):
        raise SystemExit(f"{given.results / 'runs.csv'} has no run of this config yet")
    steps = step_table(file_of(given.results, given.config, "step_time.csv"))
    ratios = {str(row["method"]): str(list(row.values())[2]) for row in steps}
    print(f"{markdown(summary_table(config, rows, ratios))}\n")
    print_tasks(config, rows, ratios)
    if steps:
        print(f"### Step times\n\n{markdown(steps)}\n")
    draw(config, rows, file_of(given.results, given.config, "runs.png"))
    if config.every:
        curves = {
            task: {
                method: losses_of(given.results, runs)
                for method, (_, runs) in at_best_rates(
                    config, of_config(config, rows), task
                ).items()
            }
            for task in config.tasks
        }
        for task, found in curves.items():
            print(f"### {task}: loss by step\n\n{markdown(curve_table(found))}\n")
        draw_curves(config, curves, file_of(given.results, given.config, "curves.png"))


if __name__ == "__main__":
    main()
