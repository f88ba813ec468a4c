"""Compare errors of `compress_many` with errors of separate LoRAs of the same total size.

    python -m research.experiments.compress_many.run  # random LoRAs: seconds
    # LoRAs of SmolLM2-135M-Instruct: minutes
    python -m research.experiments.compress_many.run --trained
    python -m research.experiments.compress_many.run --report  # the README's table

Rows go to results/errors.csv. Kinds of LoRAs that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import rasa_ext
from benchmarks.batches import Row, encoded
from benchmarks.harness import machine
from benchmarks.records import table as markdown
from rasa_ext.checkpoint.files import PREFIX, write_adapter
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer
from rasa_research import solver
from research.experiments.hashes import hash_chain, hash_hop
from research.experiments.table import Table
from research.experiments.tasks import make_task
from research.experiments.training import Recipe, Run

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("loras", "count", "rank", "basis", "numbers", "error", "apart", "date", "machine")
RANK = 8
TASKS = ("maths", "docstrings", "hop", "chain")
STEPS, BATCH_SIZE, LR = 12, 4, 3e-3
BASES = {"trained": (8, 16, 24), "made": (16, 32, 48)}


def made(folder: Path, shared: int, count: int = 8, out: int = 256, width: int = 192) -> list[Path]:
    """Write random LoRAs that share ``shared`` ranks, each with its own diagonal over them."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    B, A = draw(out, shared), draw(shared, width)
    found = []
    for i in range(count):
        own = RANK - shared
        Bi = torch.cat([B * draw(shared), draw(out, own)], 1)
        Ai = torch.cat([A, draw(own, width)])
        tensors = {f"{PREFIX}x.lora_A.weight": Ai, f"{PREFIX}x.lora_B.weight": Bi}
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["x"]}
        write_adapter(folder / str(i), config, tensors)
        found.append(folder / str(i))
    return found


def trained(folder: Path, same_start: bool) -> list[Path]:
    """Train a LoRA over q_proj and v_proj of SmolLM2-135M-Instruct for each of four tasks."""
    name = find_smollm2()
    base, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    found = []
    for i, task in enumerate(TASKS):
        torch.manual_seed(0 if same_start else i)
        model = copy.deepcopy(base).to(torch.bfloat16)
        rasa_ext.patch_model(model, rank=RANK, k=0, alpha=RANK, target_modules=["q_proj", "v_proj"])
        rows = rows_of(task, tokenizer)
        run = Run(model, rows, tokenizer.pad_token_id, Recipe(STEPS, BATCH_SIZE, LR))
        while run.going:
            run.advance()
        print(f"{task}: loss {run.losses[0]:.2f} to {run.losses[-1]:.2f}", flush=True)
        if run.diverged:
            raise ValueError(f"{task}: the loss is not finite at lr {LR:g}.")
        found.append(folder / task)
        rasa_ext.export_lora(model, found[-1])
    return found


def rows_of(task: str, tokenizer: object) -> list[Row]:
    """Return the training rows of a task."""
    count = STEPS * BATCH_SIZE
    if task in ("maths", "docstrings"):
        return make_task(task, tokenizer, train=count, dev=0, test=0).train
    records = (hash_hop if task == "hop" else hash_chain)(count, 2, seed=0, pairs=5)
    return [encoded(r["prompt"], r["completion"], tokenizer, 256) for r in records]


MADE: dict[str, Callable[[Path], list[Path]]] = {
    "made, 0 of 8 ranks shared": functools.partial(made, shared=0),
    "made, 2 of 8 ranks shared": functools.partial(made, shared=2),
    "made, 4 of 8 ranks shared": functools.partial(made, shared=4),
    "made, 8 of 8 ranks shared": functools.partial(made, shared=8),
}
TRAINED: dict[str, Callable[[Path], list[Path]]] = {
    "trained, each from a start of its own": functools.partial(trained, same_start=False),
    "trained, all from the same A": functools.partial(trained, same_start=True),
}


def measure(name: str, make: Callable[[Path], list[Path]]) -> Iterator[dict[str, object]]:
    """Compress the LoRAs and yield a row for each rank of the basis."""
    with tempfile.TemporaryDirectory() as folder:
        directories = make(Path(folder))
        for basis in BASES[name.partition(",")[0]]:
            found = solver.compress_many(directories, basis)
            yield {
                "loras": name,
                "count": len(directories),
                "rank": RANK,
                "basis": basis,
                "numbers": f"{found.loras.num_parameters / found.given:.4f}",
                "error": f"{found.errors.total:.5f}",
                "apart": f"{found.separate.total:.5f}",
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "machine": machine(),
            }


def report(rows: list[dict[str, str]]) -> str:
    """Return the README's table."""
    return markdown(
        [
            {
                "LoRAs": f"{row['count']} {row['loras']}",
                "R": row["basis"],
                "numbers": f"{float(row['numbers']):.1%}",
                "error": f"{float(row['error']):.3f}",
                "apart": f"{float(row['apart']):.3f}",
                "ratio": f"{float(row['error']) / float(row['apart']):.2f}",
            }
            for row in rows
        ]
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for errors.csv")
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--report", action="store_true", help="print the table, run nothing")
    given = parser.parse_args()
    table = Table(given.results / "errors.csv", COLUMNS)
    if not given.report:
        done = {row["loras"] for row in table.rows()}
        for name, make in (TRAINED if given.trained else MADE).items():
            if name not in done:
                table.append([*measure(name, make)])
    print(report(table.rows()))


if __name__ == "__main__":
    main()
