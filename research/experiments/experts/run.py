"""Adapt a small mixture of experts to a second task, with each way of sharing pools and with LoRA.

    # writes results/runs.csv, one row per finished run
    python -m research.experiments.experts.run [--minutes M]
    python -m research.experiments.experts.run --report  # the README's tables, from runs.csv

The base is trained once and saved in ``build/experts-base``, which git ignores. A new start resumes
the base's training and continues with the runs that the table lacks.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model

import rasa_ext
from benchmarks.harness import machine
from research.experiments.compare.report import interval
from research.experiments.experts.base import (
    RECIPE,
    experts_used,
    make_base,
    make_tokenizer,
    text_rows,
)
from research.experiments.table import Table
from research.experiments.tasks import Task, make_task
from research.experiments.training import Recipe, Run, mean_loss

RESULTS = Path(__file__).parent / "results"
BASE = Path(__file__).parents[3] / "build" / "experts-base" / "base.pt"
ALPHA = 8
ATTENTION_RANK = 4
METHODS: dict[str, dict[str, Any] | None] = {
    "attention alone": None,
    "PEFT LoRA r2": {"rank": 2},
    "LoRA with a diagonal r2": {"rank": 2, "k": 0, "experts": "layer"},
    "slot r2 k1": {"rank": 2, "k": 1, "experts": "slot"},
    "layer r2 k1": {"rank": 2, "k": 1, "experts": "layer"},
    "shared r3 k1": {"rank": 3, "k": 1, "experts": "shared"},
    "shared, pool only r8": {"rank": 8, "k": 8, "experts": "shared"},
}
"""The adapter of the experts. Attention has a PEFT LoRA in every method."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE = 150, 8
SIZES = {"train": 2400, "dev": 100, "test": 300}
COLUMNS = (
    *("method", "lr", "seed", "steps", "batch_size", "base_steps", "base_loss"),
    *("loss_before", "dev_loss", "test_loss", "last_training_loss", "text_loss"),
    *("trained", "trained_in_experts", "R", "experts_used"),
    *("seconds_per_step", "timing", "date", "machine"),
)


class Key(NamedTuple):
    """The values that identify a run."""

    method: str
    lr: float
    seed: int


def pending(rows: list[dict[str, str]]) -> list[Key]:
    """Return the missing runs: all rates with the first seed, the best rate with the others."""
    done = {Key(row["method"], float(row["lr"]), int(row["seed"])): row for row in rows}
    first, *others = SEEDS
    wanted = [Key(method, lr, first) for lr in RATES for method in METHODS]
    found = [key for key in wanted if key not in done]
    best = {method: best_rate(rows, method) for method in METHODS}
    further = (Key(m, lr, seed) for seed in others for m, lr in best.items() if lr is not None)
    return found + [key for key in further if key not in done]


def best_rate(rows: list[dict[str, str]], method: str) -> float | None:
    """Return the rate with the lowest dev loss at the first seed, or None until all rates ran."""
    losses = {
        float(row["lr"]): float(row["dev_loss"] or math.inf)
        for row in rows
        if row["method"] == method and int(row["seed"]) == SEEDS[0]
    }
    if any(lr not in losses for lr in RATES):
        return None
    return min(RATES, key=losses.__getitem__)


def prepared(base: Any, method: str, seed: int) -> Any:
    """Return a copy of the base in which only the method's parameters require grad."""
    torch.manual_seed(seed)
    model, spec = copy.deepcopy(base), METHODS[method]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=ATTENTION_RANK, lora_alpha=ALPHA, target_modules=attention)
    if spec is not None and "k" not in spec:
        config.r, config.rank_pattern = spec["rank"], dict.fromkeys(attention, ATTENTION_RANK)
        config.target_parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = inject_adapter_in_model(config, model)
    if spec is None or "k" not in spec:
        return model
    experts = ["gate_up_proj", "down_proj"]
    rasa_ext.patch_model(model, alpha=float(ALPHA), start="paper", target_modules=experts, **spec)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return model


def do(base: Any, before: dict[str, Any], task: Task, key: Key) -> dict[str, Any]:
    """Train and measure one run and return its row. A diverged run has no losses."""
    pad = make_tokenizer().pad_token_id
    model = prepared(base, key.method, key.seed)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    run = Run(model, task.train, pad, Recipe(STEPS, BATCH_SIZE, key.lr, key.seed, bfloat16=False))
    while run.going:
        run.advance()
    row = {
        **key._asdict(),
        **{"lr": repr(key.lr), "steps": run.step, "batch_size": BATCH_SIZE},
        **before,
        "trained": sum(trained.values()),
        "trained_in_experts": sum(n for name, n in trained.items() if ".experts" in name),
        "R": _rank(model, key.method),
        "seconds_per_step": f"{statistics.median(run.seconds[3:] or run.seconds):.4f}",
        "timing": "under load" if os.getloadavg()[0] > torch.get_num_threads() + 0.5 else "quiet",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }
    if run.diverged:
        return row
    last = run.losses[-max(1, run.step // 10) :]
    text = text_rows("test", make_tokenizer())[:64]

    def loss(rows: list[Any]) -> str:
        return f"{mean_loss(model, rows, pad, bfloat16=False):.5f}"

    return row | {
        "dev_loss": loss(task.dev),
        "test_loss": loss(task.test),
        "text_loss": loss(text),
        "last_training_loss": f"{statistics.mean(last):.5f}",
    }


def _rank(model: Any, method: str) -> int | str:
    """Return the rank of the weight change of one expert."""
    spec = METHODS[method]
    if spec is None:
        return ""
    if "k" not in spec:
        return int(spec["rank"])
    (rank,) = {row.R for row in rasa_ext.summary(model)}
    return rank


def report(rows: list[dict[str, str]]) -> Iterator[str]:
    """Yield markdown tables: each method at its best rate over the seeds, then all rates."""
    head = ("experts", "R", "trained in experts", "rate", "held-out loss", "less PEFT's LoRA")
    yield f"| {' | '.join((*head, 'loss on the base text', 'ms a step', 'seeds'))} |"
    yield f"|{' --- |' * (len(head) + 3)}"
    reference = _at_best(rows, "PEFT LoRA r2")
    for method in METHODS:
        found = _at_best(rows, method)
        if not found:
            yield f"| {method} |{' - |' * (len(head) + 2)}"
            continue
        both = [
            float(row["test_loss"]) - float(reference[seed]["test_loss"])
            for seed, row in found.items()
            if seed in reference
        ]
        row = found[SEEDS[0]]
        cells = (
            row["R"] or "-",
            f"{int(row['trained_in_experts']):,}",
            row["lr"],
            _spread([float(each["test_loss"]) for each in found.values()]),
            "-" if method == "PEFT LoRA r2" or len(both) < 2 else interval(both, 3),
            _spread([float(each["text_loss"]) for each in found.values()]),
            f"{1e3 * statistics.median(float(r['seconds_per_step']) for r in found.values()):.0f}",
            str(len(found)),
        )
        yield f"| {method} | {' | '.join(cells)} |"
    yield ""
    yield f"| loss to choose by, first seed | {' | '.join(f'{lr:g}' for lr in RATES)} |"
    yield f"|{' --- |' * (len(RATES) + 1)}"
    for method in METHODS:
        losses = {
            float(r["lr"]): r["dev_loss"] or "diverged"
            for r in rows
            if r["method"] == method and int(r["seed"]) == SEEDS[0]
        }
        yield f"| {method} | {' | '.join(losses.get(lr, '-') for lr in RATES)} |"


def _at_best(rows: list[dict[str, str]], method: str) -> dict[int, dict[str, str]]:
    """Return a method's rows at its best rate by seed, or no rows until all rates ran."""
    lr = best_rate(rows, method)
    return {
        int(row["seed"]): row
        for row in rows
        if row["method"] == method and float(row["lr"]) == lr and row["test_loss"]
    }


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return " ".join(f"{value:.3f}" for value in values) or "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for runs.csv")
    parser.add_argument("--base", type=Path, default=BASE, help="file of the base model")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true", help="print tables, run nothing")
    given = parser.parse_args()
    table = Table(given.results / "runs.csv", COLUMNS)
    if given.report:
        print("\n".join(report(table.rows())))
        return
    end = time.monotonic() + 60 * given.minutes
    tokenizer = make_tokenizer()
    base, base_loss = make_base(given.base, RECIPE)
    task = make_task("maths", tokenizer, **SIZES)
    pad = tokenizer.pad_token_id
    before = {
        "base_steps": RECIPE.steps,
        "base_loss": f"{base_loss:.5f}",
        "loss_before": f"{mean_loss(base, task.test, pad, bfloat16=False):.5f}",
        "experts_used": f"{experts_used(base, task.test[:64], pad):.2f}",
    }
    print(before, flush=True)
    while (left := pending(table.rows())) and time.monotonic() < end:
        began = time.monotonic()
        row = do(base, before, task, left[0])
        table.append([row])
        shown = {name: row.get(name) for name in ("dev_loss", "test_loss", "seconds_per_step")}
        print(f"{left[0]}: {shown}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(left)} known runs are left" if left else "done")


if __name__ == "__main__":
    main()
