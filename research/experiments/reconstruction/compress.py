"""Compress a fine-tune into RaSA and LoRA adapters, and measure accuracy and size.

    python -m research.experiments.reconstruction.finetune  # once: the weight changes
    # writes results/compress.csv, one row per adapter, and prints the table
    python -m research.experiments.reconstruction.compress

Each adapter is made by ``rasa_research.solver.compress``, saved, loaded into a fresh copy of the
base and tested on the fine-tune's held-out problems. k = 0 is the optimal LoRA, the truncated SVD
of every change. The table also has the base, the fine-tune, and the base with the whole change of
the adapted layers, the most that an adapter could represent. Adapters in the table are not remade.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rasa_ext
from benchmarks.harness import machine
from benchmarks.records import table as markdown
from rasa_ext.checkpoint.files import WEIGHTS as FILE
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer
from rasa_ext.patching.targets import make_plan
from rasa_research import solver
from research.experiments.reconstruction.finetune import RESULTS, WEIGHTS, scores
from research.experiments.table import Table
from research.experiments.tasks import Task, make_task

COLUMNS = (
    *("what", "rank", "k", "numbers", "bytes", "error", "lora_error", "loss", "exact_match"),
    *("iterations", "seconds", "date", "machine"),
)
RANKS = (8, 16, 32)
ITERATIONS = 15
BASE, LAYERS, WHOLE, ADAPTER = "base", "adapted layers, whole change", "fine-tune", "adapter"


class Key(NamedTuple):
    """The values that identify a row; rank and k are 0 for a row without adapter."""

    what: str
    rank: int = 0
    k: int = 0


def planned() -> list[Key]:
    """Return the keys of all rows in order of running."""
    ks = {rank: (0, 1, rank // 4) for rank in RANKS}
    adapters = [Key(ADAPTER, rank, k) for rank in RANKS for k in ks[rank]]
    return [Key(BASE), Key(WHOLE), Key(LAYERS), *adapters]


class Judge:
    """The base model, the fine-tune, and the held-out problems that test the adapters."""

    def __init__(
        self, base: Any, tuned: Any, tokenizer: Any, task: Task, *, bfloat16: bool = True
    ) -> None:
        """Set both models, which are float32 and never changed, and the problems."""
        self.base, self.tuned, self.tokenizer, self.task = base, tuned, tokenizer, task
        self.bfloat16 = bfloat16

    def row(self, key: Key, iterations: int = ITERATIONS) -> dict[str, Any]:
        """Make and test the model of one row."""
        row: dict[str, Any] = {**key._asdict(), "machine": machine()}
        row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        if key.what == WHOLE:
            return row | self._scores(self.tuned)
        model = copy.deepcopy(self.base)
        if key.what == LAYERS:
            self._copy_layers(model)
        elif key.what == ADAPTER:
            row |= self._adapt(model, key, iterations)
        return row | self._scores(model)

    def _adapt(self, model: Any, key: Key, iterations: int) -> dict[str, Any]:
        began = time.perf_counter()
        found = solver.compress(
            self.base,
            self.base.state_dict(),
            self.tuned.state_dict(),
            key.rank,
            key.k,
            iterations=iterations if key.k else 0,
            dtype=torch.float32,
        )
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            found.save(self.base, folder)
            rasa_ext.load_adapter(model, folder)
            if not key.k:  # a LoRA file of other tools has no diagonal
                rasa_ext.export_lora(model, folder)
            size = (Path(folder) / FILE).stat().st_size
        return {
            "numbers": found.num_parameters if key.k else found.lora_num_parameters,
            "bytes": size,
            "error": f"{found.error:.6f}",
            "lora_error": f"{found.lora_error:.6f}",
            "iterations": iterations if key.k else 0,
            "seconds": f"{seconds:.0f}",
        }

    @torch.no_grad()
    def _copy_layers(self, model: Any) -> None:
        tuned = dict(self.tuned.named_modules())
        for group in make_plan(model, rasa_ext.RasaConfig()).groups:
            for name in group.names:
                model.get_submodule(name).weight.copy_(tuned[name].weight)

    def _scores(self, model: Any) -> dict[str, str]:
        found = scores(model, self.tokenizer, self.task, self.bfloat16)
        return {name: f"{value:.5f}" for name, value in found.items() if value is not None}


def key_of(row: Mapping[str, str]) -> Key:
    """Return the key of a table row."""
    return Key(row["what"], int(row["rank"]), int(row["k"]))


def shown(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Format the rows as a readable table, in order of running."""
    lines = []
    for row in sorted(rows, key=lambda row: planned().index(key_of(row))):
        rank, k = int(row["rank"]), int(row["k"])
        name = f"RaSA r={rank} k={k}" if k else f"LoRA r={rank}, truncated SVD"
        line: dict[str, object] = {"model": name if rank else row["what"]}
        line["numbers"] = f"{int(row['numbers']):,}" if row["numbers"] else "-"
        line["file, MB"] = f"{int(row['bytes']) / 1e6:.2f}" if row["bytes"] else "-"
        line["error"] = row["error"] or "-"
        ratio = float(row["error"] or "nan") / float(row["lora_error"] or "nan")
        line["over LoRA's"] = f"{ratio:.4f}" if row["error"] else "-"
        line["held-out loss"] = f"{float(row['loss']):.4f}"
        line["exact match, %"] = f"{100 * float(row['exact_match']):.0f}"
        lines.append(line)
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="output folder of finetune")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for compress.csv")
    parser.add_argument("--held-out", type=int, default=100, help="number of held-out problems")
    given = parser.parse_args()
    table = Table(given.results / "compress.csv", COLUMNS)
    have = {key_of(row) for row in table.rows()}
    left = [key for key in planned() if key not in have]
    if left:
        name = find_smollm2()
        tokenizer = load_tokenizer(name)
        task = make_task("maths", tokenizer, train=0, dev=0, test=given.held_out)
        tuned = load_model(str(given.weights / "tuned"), "float32")
        judge = Judge(load_model(name, "float32"), tuned, tokenizer, task)
        for key in left:
            row = judge.row(key)
            table.append([row])
            print(f"{key}: {row}", flush=True)
    print(markdown(shown(table.rows())))


if __name__ == "__main__":
    main()
