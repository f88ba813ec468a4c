"""Train SmolLM2-135M-Instruct with every method at every rate, and write the results.

    # writes results/runs.csv, one row per finished run
    python -m research.experiments.compare.run [--minutes M]
    python -m research.experiments.compare.report  # tables and plots of runs.csv

A new start continues with the runs that the table lacks; two processes share the runs. After M
minutes the command finishes the current run and ends. An interrupted run leaves no row; if the
config sets ``every``, the run resumes from its last measured loss.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.batches import Row, collate
from benchmarks.harness import machine
from benchmarks.records import environment, write_json
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer
from research.experiments.compare.config import (
    BASE,
    CONFIG,
    RESULTS,
    Config,
    Key,
    only,
    pending,
    read_config,
)
from research.experiments.compare.curves import curve_path
from research.experiments.compare.methods import between, groups, optimizer, planned, prepared
from research.experiments.experts.upcycled import made
from research.experiments.table import Table
from research.experiments.tasks import Task, make_task, other_text, solved
from research.experiments.training import Recipe, Run, mean_loss, save

COLUMNS = (
    *("task", "method", "lr", "seed", "steps", "settings"),
    *("dev_loss", "test_loss", "exact_match", "other_text_loss", "last_training_loss"),
    *("trainable", "seconds_per_step", "timing", "date", "machine", "system"),
)

STATE = Path(__file__).parents[3] / "build" / "runs"
_AT_ONCE = 16
"""Batch size for measuring hidden states."""


class Bench:
    """The base model, the tasks and the text that measures forgetting."""

    def __init__(
        self,
        config: Config,
        base: Any,
        tokenizer: Any,
        results: Path,
        state: Path = STATE,
        gsm8k: Path | None = None,
    ) -> None:
        """Set the float32 base model, which is never changed, and the folders.

        ``results`` has the tables, ``state`` the unfinished runs, ``gsm8k`` the files of GSM8K.
        """
        self.config, self.base, self.tokenizer = config, base, tokenizer
        self.pad = tokenizer.pad_token_id
        self.other = other_text(tokenizer, config.other_text)
        self.results, self.state, self.gsm8k = results, state, gsm8k
        self._tasks: dict[str, Task] = {}
        self._loras: dict[tuple[object, ...], Any] = {}

    def task(self, name: str) -> Task:
        """Return a task, which is made on first use."""
        if name not in self._tasks:
            asked = ("train", "dev", "test", "seq_len", "questions")
            given = {each: getattr(self.config, each) for each in asked}
            self._tasks[name] = make_task(name, self.tokenizer, **given, gsm8k=self.gsm8k)
        return self._tasks[name]

    def task_of(self, key: Key) -> Task:
        """Return the task of a run."""
        return self.task(key.task)

    def base_of(self, key: Key) -> Any:
        """Return the model that a run starts from."""
        return self.with_lora(self.base, key)

    def with_lora(self, base: Any, key: Key, **options: Any) -> Any:
        """Return ``base``, with a LoRA trained on the run's task if the method goes on from one.

        ``options`` are the LoRA's, besides rank and alpha. The runs of a process share the LoRA.
        """
        spec = {} if key.method == BASE else self.config.methods[key.method]
        if spec.get("kind") != "continued":
            return base
        rank, before = spec["rank"], spec["before"]
        name = (key.task, key.seed, rank, *before.values())
        if name not in self._loras:
            lora = {"kind": "lora", "rank": rank, "alpha": rank, **options}
            size, bfloat16 = self.config.batch_size, self.config.bfloat16
            recipe = Recipe(before["steps"], size, before["lr"], seed=key.seed, bfloat16=bfloat16)
            run = make_run(base, lora, self.task_of(key).train, self.pad, recipe)
            while run.going:
                run.advance()
            self._loras[name] = run.model
        return self._loras[name]

    def ranks(self, task: Task, rank: int) -> dict[str, int]:
        """Return GeLoRA's ranks for a task by layer, planned once and then read from a table."""
        table = Table(self.results / "ranks.csv", ("task", "train", "rank", "layer", "planned"))
        same = {"task": task.name, "train": str(len(task.train)), "rank": str(rank)}
        found = {r["layer"]: int(r["planned"]) for r in table.rows() if same.items() <= r.items()}
        if not found:
            rows = sorted(task.train, key=lambda row: len(row["input_ids"]))
            batches = (
                collate(rows[i : i + _AT_ONCE], self.pad) for i in range(0, len(rows), _AT_ONCE)
            )
            read = ({k: v for k, v in batch.items() if k != "labels"} for batch in batches)
            found = planned(self.base, read, rank)
            table.append([{**same, "layer": layer, "planned": r} for layer, r in found.items()])
        return found

    def do(self, key: Key) -> dict[str, Any]:
        """Train and measure one run and return its row. A diverged run has no losses."""
        config, task, row = self.config, self.task_of(key), _head(self.config, key)
        base = self.base_of(key)
        if key.method == BASE:
            measured = self._measured(base.requires_grad_(False), task)
            return row | {"steps": 0, "trainable": 0, **measured}
        spec = config.methods[key.method]
        steps = max(1, round(spec.get("share", 1) * config.steps[key.task]))
        recipe = Recipe(steps, config.batch_size, key.lr, seed=key.seed, bfloat16=config.bfloat16)
        ranks = self.ranks(task, spec["rank"]) if "ranks" in spec else None
        _forget_peak()
        run = make_run(base, spec, task.train, self.pad, recipe, ranks)
        if config.every:
            self._train_and_measure(run, task, key, row)
        while run.going:
            run.advance()
        row |= {"steps": run.step, "trainable": run.trainable, **_timing(run)}
        if run.diverged:
            return row
        last = run.losses[-max(1, run.step // 10) :]
        row["last_training_loss"] = _shown(sum(last) / len(last))
        return row | self._measured(run.model, task)

    def _train_and_measure(self, run: Run, task: Task, key: Key, row: Mapping[str, Any]) -> None:
        """Train, and measure the dev loss and save the run every ``config.every`` steps."""
        path = curve_path(self.results, key, row["settings"])
        state, curve = self.state / f"{path.stem}.pt", []
        if state.is_file():
            found = torch.load(state)
            run.load_state_dict(found["run"])
            curve = found["curve"]
        while run.going:
            run.advance()
            if run.going and run.step % self.config.every:
                continue
            last = run.losses[-self.config.every :]
            loss = mean_loss(run.model, task.dev, self.pad, bfloat16=self.config.bfloat16)
            curve.append({"step": run.step, "loss": loss, "training_loss": sum(last) / len(last)})
            save({"run": run.state_dict(), "curve": curve}, state)
        record = {
            **key._asdict(),
            "settings": row["settings"],
            "curve": curve,
            "peak_memory_bytes": _peak(),
            "machine": environment("cpu"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        state.unlink(missing_ok=True)

    def _measured(self, model: Any, task: Task) -> dict[str, str]:
        def loss(rows: list[Row]) -> str:
            return _shown(mean_loss(model, rows, self.pad, bfloat16=self.config.bfloat16))

        right = solved(model, self.tokenizer, task, bfloat16=self.config.bfloat16)
        return {
            "dev_loss": loss(task.dev),
            "test_loss": loss(task.test),
            "exact_match": "" if right is None else _shown(right),
            "other_text_loss": loss(task.other or self.other),
        }


def make_run(
    base: Any,
    spec: Mapping[str, Any],
    rows: Sequence[Row],
    pad_token_id: int,
    recipe: Recipe,
    ranks: Mapping[str, int] | None = None,
) -> Run:
    """Make a method's run over a copy of ``base``, with its optimizer and work between steps."""
    model = prepared(base, spec, recipe.seed, bfloat16=recipe.bfloat16, ranks=ranks)
    return Run(
        model,
        rows,
        pad_token_id,
        recipe,
        groups(model, spec, recipe.lr),
        between(model, spec, recipe.seed),
        optimizer(model, spec),
    )


def advance(bench: Any, table: Table) -> bool:
    """Do the first missing run that no other process has claimed; return False if there is none."""
    for key in pending(bench.config, table.rows()):
        with table.claim(repr(key)) as mine:
            # Another process may have finished the run since the table was read.
            if not mine or key not in pending(bench.config, table.rows()):
                continue
            began = time.monotonic()
            row = bench.do(key)
            table.append([row])
        left = len(pending(bench.config, table.rows()))
        shown = {name: row.get(name) for name in ("dev_loss", "exact_match", "other_text_loss")}
        print(f"{key}: {shown}, {time.monotonic() - began:.0f} s; {left} left", flush=True)
        return True
    return False


def _head(config: Config, key: Key) -> dict[str, Any]:
    return {
        **key._asdict(),
        "lr": repr(key.lr),
        "settings": config.settings(key.task, key.method),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "system": platform.platform(),
    }


def _timing(run: Run) -> dict[str, str]:
    """Return the median step time and whether the machine had other load at the end."""
    others = os.getloadavg()[0] - torch.get_num_threads()
    seconds = run.seconds[min(3, len(run.seconds) - 1) :]
    return {
        "seconds_per_step": f"{statistics.median(seconds):.3f}",
        "timing": "under load" if others > 0.5 else "quiet",
    }


def _forget_peak() -> None:
    """Reset the process's peak memory in the kernel, if the system supports that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Return the process's peak memory in bytes since the reset, including the base's copy."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(each.split()[1]) << 10 for each in lines if each.startswith("VmHWM"))
    return None


def _shown(value: float) -> str:
    return f"{value:.5f}"


def work(bench: Any, table: Table, minutes: float) -> None:
    """Do runs until none is left or ``minutes`` have passed."""
    end = time.monotonic() + 60 * minutes
    while (left := pending(bench.config, table.rows())) and time.monotonic() < end:
        if not advance(bench, table):
            time.sleep(5)  # other processes do all known runs; their results may require more runs
    print(f"{len(left)} known runs are left" if left else "done")


def arguments(description: str | None, config: Path, results: Path) -> argparse.ArgumentParser:
    """Return a parser with the options that all commands with runs share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--results", type=Path, default=results, help="folder for runs.csv")
    parser.add_argument("--state", type=Path, default=STATE, help="folder for unfinished runs")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true", help="list the runs to do, run nothing")
    return parser


def choose(parser: argparse.ArgumentParser) -> None:
    """Add the options for ``only``."""
    parser.add_argument("--methods", nargs="+", default=(), help="the config's methods to compare")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=(),
        help="learning rates, each with all seeds, instead of the config's",
    )


def main() -> None:
    """Run the command."""
    parser = arguments(__doc__, CONFIG, RESULTS)
    parser.add_argument("--gsm8k", type=Path, help="folder of GSM8K's train.jsonl and test.jsonl")
    choose(parser)
    given = parser.parse_args()
    config = only(read_config(given.config), given.methods, given.rates)
    table = Table(given.results / "runs.csv", COLUMNS)
    if given.list:
        print("\n".join(map(str, pending(config, table.rows()))))
        return
    name = find_smollm2()
    base, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    if config.upcycled is not None:
        base = made(base, tokenizer, given.state, **config.upcycled)
    bench = Bench(config, base, tokenizer, given.results, given.state, given.gsm8k)
    work(bench, table, given.minutes)


if __name__ == "__main__":
    main()
