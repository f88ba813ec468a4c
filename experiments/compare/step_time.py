"""A training step of every method, interleaved in one process: the only place that compares times.

    python -m experiments.compare.step_time [--lora-ranks 8 16 32 37 48] [--rounds 15]

Forward, backward and optimizer on one batch of word problems. It wants an idle machine, and says
where it was not. LoRAs of further ranks find the one that takes as long as RaSA with r = 8, k = 1.
Writes results/step_time.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.records import table as markdown
from experiments.compare.config import CONFIG, RESULTS, read_config
from experiments.compare.methods import prepared
from experiments.tasks import make_task
from experiments.training import Recipe, Row, Run
from rasa_ext.train.model_loading import find_smollm2, load_model, load_tokenizer

REFERENCE = "rasa-r8-k1"


def measure(runs: dict[str, Run], rounds: int, warmup: int = 3) -> list[dict[str, Any]]:
    """Quartiles of seconds per step of every run, and its median over the reference's."""
    seconds = harness.interleaved({n: r.advance for n, r in runs.items()}, rounds, warmup)
    middle = {name: harness.quartiles(found) for name, found in seconds.items()}
    reference = middle.get(REFERENCE, next(iter(middle.values())))[1]
    return [
        {
            "method": name,
            "trainable": runs[name].trainable,
            "seconds_low": f"{low:.4f}",
            "seconds": f"{median:.4f}",
            "seconds_high": f"{high:.4f}",
            f"over_{REFERENCE}": f"{median / reference:.3f}",
        }
        for name, (low, median, high) in middle.items()
    ]


def make_runs(
    base: Any, rows: list[Row], pad: int, specs: dict[str, Any], recipe: Recipe
) -> dict[str, Run]:
    """A run of every method on the same rows."""
    return {
        name: Run(prepared(base, spec, 0, bfloat16=recipe.bfloat16), rows, pad, recipe)
        for name, spec in specs.items()
    }


def main() -> None:
    """Run the command above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--lora-ranks", type=int, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    harness.pin_allocator()
    load = os.getloadavg()[0]
    config, name = read_config(given.config), find_smollm2()
    specs = dict(config.methods)
    specs |= {f"lora-r{r}": {"kind": "lora", "rank": r, "alpha": r} for r in given.lora_ranks}
    base, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    rows = make_task("maths", tokenizer, train=config.batch_size, dev=0, test=0).train
    recipe = Recipe(given.rounds + 3, config.batch_size, 1e-4, bfloat16=config.bfloat16)
    runs = make_runs(base, rows, tokenizer.pad_token_id, specs, recipe)
    same = {
        "load_before": f"{load:.2f}",
        "threads": torch.get_num_threads(),
        "machine": harness.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    found = measure(runs, given.rounds)
    print(markdown(found))
    if load > 0.5:
        print(f"\nThe machine was not idle (load {load:.2f}): no figure to quote.")
    write(given.results / "step_time.csv", [{**row, **same} for row in found])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The table, anew: times of different runs of this command do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
