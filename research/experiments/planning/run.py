"""Train SmolLM2-135M-Instruct on HashHop and on HashChain, and measure the ranks that are used.

    # writes results/runs.csv, one row per finished run
    python -m research.experiments.planning.run [--minutes M]
    python -m research.experiments.planning.run --report  # the README's tables, from runs.csv

A new start continues with the runs that the table lacks.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.batches import Row, encoded
from benchmarks.harness import machine
from rasa_ext.analysis import GroupAnalysis, analyze, analyze_lora
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer
from research.experiments.compare.methods import prepared
from research.experiments.hashes import hash_chain, hash_hop
from research.experiments.table import Table
from research.experiments.training import Recipe, Run, mean_loss

RESULTS = Path(__file__).parent / "results"
TASKS = {"hop": hash_hop, "chain": hash_chain}
METHODS: dict[str, dict[str, Any]] = {
    "rasa-r8-k1": {"kind": "rasa", "rank": 8, "k": 1, "alpha": 8},
    "lora-r8": {"kind": "lora", "rank": 8, "alpha": 8},
}
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, LR = 60, 4, 3e-3
HOPS, PAIRS = 2, 5
HELD_OUT, HELD_OUT_SEED = 32, 1000
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COLUMNS = (
    *("task", "method", "seed", "steps", "batch_size", "lr", "hops", "pairs"),
    *("loss_before", "loss", "last_training_loss", "learnt_tokens", "effective_rank"),
    *(*KINDS, "norm", "date", "machine"),
)


class Key(NamedTuple):
    """The values that identify a run."""

    task: str
    method: str
    seed: int


def pending(rows: list[dict[str, str]]) -> list[Key]:
    """Return the runs that the table lacks, seed by seed, so that early seeds finish first."""
    done = {Key(row["task"], row["method"], int(row["seed"])) for row in rows}
    every = (Key(task, name, seed) for seed in SEEDS for name in METHODS for task in TASKS)
    return [key for key in every if key not in done]


def rows_of(task: str, count: int, seed: int, tokenizer: Any) -> list[Row]:
    """Encode records of a task; the completion and its end token have a loss."""
    records = TASKS[task](count, HOPS, seed=seed, pairs=PAIRS)
    end = tokenizer.eos_token
    return [encoded(r["prompt"], r["completion"] + end, tokenizer, 256) for r in records]


def do(base: Any, tokenizer: Any, key: Key) -> dict[str, Any]:
    """Train and measure one run and return its row. Raises ValueError if the run diverges."""
    model = prepared(base, METHODS[key.method], key.seed, bfloat16=True)
    pad = tokenizer.pad_token_id
    train = rows_of(key.task, STEPS * BATCH_SIZE, key.seed, tokenizer)
    test = rows_of(key.task, HELD_OUT, HELD_OUT_SEED, tokenizer)
    before = mean_loss(model, test, pad)
    run = Run(model, train, pad, Recipe(STEPS, BATCH_SIZE, LR, seed=key.seed))
    while run.going:
        run.advance()
    if run.diverged:
        raise ValueError(f"{key}: the loss is not finite at lr {LR:g}.")
    layers = [layer for group in analyzed(model) for layer in group.layers]
    ranks = {
        kind: statistics.mean(e.effective_rank for e in layers if e.name.endswith(kind))
        for kind in KINDS
    }
    return {
        **key._asdict(),
        **{"steps": STEPS, "batch_size": BATCH_SIZE, "lr": LR, "hops": HOPS, "pairs": PAIRS},
        "loss_before": f"{before:.4f}",
        "loss": f"{mean_loss(model, test, pad):.4f}",
        "last_training_loss": f"{statistics.mean(run.losses[-6:]):.4f}",
        "learnt_tokens": f"{statistics.mean(sum(i >= 0 for i in r['labels']) for r in train):.1f}",
        "effective_rank": f"{statistics.mean(e.effective_rank for e in layers):.3f}",
        **{kind: f"{rank:.3f}" for kind, rank in ranks.items()},
        "norm": f"{statistics.mean(layer.norm for layer in layers):.4f}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }


def analyzed(model: Any) -> list[GroupAnalysis]:
    """Analyze the adapter of a model patched by rasa_ext or PEFT."""
    if not hasattr(model, "peft_config"):
        return analyze(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return analyze_lora(folder)


def report(rows: list[dict[str, str]]) -> Iterator[str]:
    """Yield the lines of markdown tables with mean ± standard deviation over the seeds."""
    yield "| method | task | loss before | after | effective rank | norm | seeds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for method in METHODS:
        for task in TASKS:
            found = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            cells = (_spread(found, name) for name in ("loss_before", "loss", "effective_rank"))
            norm = _spread(found, "norm")
            yield f"| {method} | {task} | {' | '.join(cells)} | {norm} | {len(found)} |"
    yield ""
    yield f"| hop / chain | all | {' | '.join(KINDS)} |"
    yield f"| --- | {' | '.join('---' for _ in ('all', *KINDS))} |"
    for method in METHODS:
        ratios = (_spread(_ratios(rows, method, n), "ratio") for n in ("effective_rank", *KINDS))
        yield f"| {method} | {' | '.join(ratios)} |"


def _ratios(rows: list[dict[str, str]], method: str, name: str) -> list[dict[str, str]]:
    """Return the ratios of hop's value to chain's, seed by seed."""
    found = {(r["task"], r["seed"]): float(r[name]) for r in rows if r["method"] == method}
    both = (seed for task, seed in found if task == "hop" and ("chain", seed) in found)
    return [{"ratio": str(found["hop", seed] / found["chain", seed])} for seed in both]


def _spread(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows]
    if len(values) < 2:
        return " ".join(f"{value:.2f}" for value in values) or "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for runs.csv")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true", help="print tables, run nothing")
    given = parser.parse_args()
    table = Table(given.results / "runs.csv", COLUMNS)
    if given.report:
        print("\n".join(report(table.rows())))
        return
    end = time.monotonic() + 60 * given.minutes
    name = find_smollm2()
    base, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    while (left := pending(table.rows())) and time.monotonic() < end:
        began = time.monotonic()
        row = do(base, tokenizer, left[0])
        table.append([row])
        shown = {name: row[name] for name in ("loss_before", "loss", "effective_rank")}
        print(f"{left[0]}: {shown}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(left)} runs are left" if left else "done")


if __name__ == "__main__":
    main()
