"""Time a training step of every method, interleaved in one process.

    python -m research.experiments.compare.step_time [--lora-ranks 8 16 32 37 48] [--rounds 15]

Only these times can be compared between methods. A step is forward, backward, optimizer and the
method's work after it, on one batch of the config's first task. The machine should be idle; the
command warns if it was not. On a busy machine, ``--processor`` measures processor time instead of
wall time. ``--lora-ranks`` adds LoRAs of PEFT, ``--own-lora-ranks`` LoRAs of rasa_ext. The times go
to results/step_time.csv, or to NAME-step_time.csv for another config NAME.yaml.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.batches import Row
from benchmarks.records import table as markdown
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer
from research.experiments.compare.config import CONFIG, RESULTS, file_of, read_config
from research.experiments.compare.run import Bench, make_run
from research.experiments.training import Recipe, Run

REFERENCE = "rasa-r8-k1"


def measure(
    runs: dict[str, Run],
    rounds: int,
    warmup: int = 3,
    *,
    reference: str = REFERENCE,
    processor: bool = False,
) -> list[dict[str, Any]]:
    """Measure quartiles of every run's seconds per step, and the median over the reference's.

    With ``processor``, count the processor time of this process instead of wall time.
    """
    used: dict[str, list[float]] = {name: [] for name in runs}

    def step(name: str) -> None:
        began = time.process_time()
        runs[name].advance()
        used[name].append(time.process_time() - began)

    calls = {name: lambda name=name: step(name) for name in runs}
    seconds = harness.interleaved(calls, rounds, warmup)
    if processor:
        seconds = {name: found[warmup:] for name, found in used.items()}
    middle = {name: harness.quartiles(found) for name, found in seconds.items()}
    over = middle.get(reference, next(iter(middle.values())))[1]
    return [
        {
            "method": name,
            "trainable": runs[name].trainable,
            "seconds_low": f"{low:.4f}",
            "seconds": f"{median:.4f}",
            "seconds_high": f"{high:.4f}",
            f"over_{reference}": f"{median / over:.3f}",
        }
        for name, (low, median, high) in middle.items()
    ]


def make_runs(
    base: Any,
    rows: list[Row],
    pad: int,
    specs: dict[str, Any],
    recipe: Recipe,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Run]:
    """Make a run of every method on the same rows; ``ranks`` go to methods that plan ranks."""
    return {
        name: make_run(base, spec, rows, pad, recipe, ranks if "ranks" in spec else None)
        for name, spec in specs.items()
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--gsm8k", type=Path, help="folder of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--methods", nargs="*", help="methods of the config; by default all")
    parser.add_argument("--lora-ranks", type=int, nargs="*", default=[])
    parser.add_argument("--own-lora-ranks", type=int, nargs="*", default=[])
    parser.add_argument("--reference", default=REFERENCE, help="method to divide times by")
    parser.add_argument("--processor", action="store_true", help="measure processor time")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    harness.pin_allocator()
    load = os.getloadavg()[0]
    config, name = read_config(given.config), find_smollm2()
    specs = {n: config.methods[n] for n in given.methods or config.methods}
    specs |= {f"lora-r{r}": {"kind": "lora", "rank": r, "alpha": r} for r in given.lora_ranks}
    for r in given.own_lora_ranks:
        options = {"rank": r, "alpha": r}
        own = {"kind": "ours", "method": "lora", "options": options, "steps": {}}
        specs[f"own-lora-r{r}"] = own
    base, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    bench = Bench(config, base, tokenizer, given.results, gsm8k=given.gsm8k)
    sizes = {spec["rank"] for spec in specs.values() if "ranks" in spec}
    ranks = bench.ranks(bench.task(config.tasks[0]), *sizes) if sizes else None
    rows = bench.task(config.tasks[0]).train[: config.batch_size]
    recipe = Recipe(given.rounds + 3, config.batch_size, 1e-4, bfloat16=config.bfloat16)
    runs = make_runs(base, rows, tokenizer.pad_token_id, specs, recipe, ranks)
    same = {
        "load_before": f"{load:.2f}",
        "clock": "processor" if given.processor else "wall",
        "threads": torch.get_num_threads(),
        "machine": harness.machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    found = measure(runs, given.rounds, reference=given.reference, processor=given.processor)
    print(markdown(found))
    if load > 0.5 and not given.processor:
        print(f"\nThe machine was not idle (load {load:.2f}); do not quote these times.")
    path = file_of(given.results, given.config, "step_time.csv")
    write(path, [{**row, **same} for row in found])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Overwrite the table, because times of different runs of this command cannot be compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
