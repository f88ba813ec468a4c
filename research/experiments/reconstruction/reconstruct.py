"""Measure how well RaSA reconstructs a real fine-tune's weight changes: the paper's two figures.

    python -m research.experiments.reconstruction.finetune  # once: the weight changes
    python -m research.experiments.reconstruction.reconstruct  # writes results/errors.csv
    python -m research.experiments.reconstruction.figures  # writes results/*.png, prints tables

Every run is ``rasa_research.solver.decompose`` on all layers of one module type, with rank r, k
shared ranks and one of two starts. The first runs measure error against iteration (r = 8, k = 1, 50
iterations; the two cheapest module types also for 400). The others measure error against k (0, 1,
2, 4, 6, 8 at r = 8, 16, 32; 15 iterations). Runs that are in the table are not repeated. With
``--minutes M`` no run starts after M minutes.
"""

from __future__ import annotations

import argparse
import itertools
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_research.solver import decompose
from research.experiments.reconstruction.deltas import tuned_deltas
from research.experiments.reconstruction.finetune import RESULTS, WEIGHTS
from research.experiments.table import Table

COLUMNS = (
    *("module", "rank", "k", "init", "iteration", "error", "lora_error"),
    *("layers", "out", "in", "dtype"),
)
CURVE = (8, 1, 50)
"""r, k and iterations of the runs of error against iteration."""
RANKS, KS, SWEEP = (8, 16, 32), (1, 2, 4, 8, 6, 0), 15
"""r, k and iterations of the runs of error against k; k is in order of running."""
LONG = ("k_proj", "v_proj"), 400
"""Module types with longer runs at ``CURVE``'s r and k, and iterations: a random start is slow."""
INITS = ("svd", "random")


class Key(NamedTuple):
    """The values that identify a run."""

    module: str
    rank: int
    k: int
    init: str


def planned(modules: Iterable[str]) -> list[tuple[Key, int]]:
    """Return every run with its iterations, in order of running.

    k = 0 needs one iteration, because without a pool the layers are independent.
    """
    modules = list(modules)
    rank, k, iterations = CURVE
    runs = [(Key(m, rank, k, init), iterations) for m, init in itertools.product(modules, INITS)]
    further, iterations = LONG
    for module, init in itertools.product(further, INITS):
        if module in modules:
            runs.append((Key(module, rank, k, init), iterations))
    for rank, k, module, init in itertools.product(RANKS, KS, modules, INITS):
        runs.append((Key(module, rank, k, init), SWEEP if k else 1))
    return runs


def done(rows: Iterable[dict[str, str]]) -> dict[Key, int]:
    """Return the runs of a table and the iterations of each."""
    found: dict[Key, int] = {}
    for row in rows:
        key = Key(row["module"], int(row["rank"]), int(row["k"]), row["init"])
        found[key] = max(found.get(key, 0), int(row["iteration"]))
    return found


def reconstruct(
    key: Key, deltas: Sequence[Tensor], iterations: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Do one run and return its rows: the start, then one row per iteration.

    A random start depends only on the key, not on earlier runs.
    """
    torch.manual_seed(zlib.crc32(repr(tuple(key)).encode()))
    found = decompose(deltas, key.rank, key.k, iterations=iterations, init=key.init, dtype=dtype)
    same = {
        **key._asdict(),
        "lora_error": f"{found.lora_error:.7g}",
        "layers": len(deltas),
        "out": deltas[0].shape[0],
        "in": deltas[0].shape[1],
        "dtype": str(dtype).removeprefix("torch."),
    }
    return [
        {**same, "iteration": i, "error": f"{error:.7g}"} for i, error in enumerate(found.errors)
    ]


def fill(
    table: Table,
    deltas: dict[str, list[Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    seconds: float = float("inf"),
    runs: Sequence[tuple[Key, int]] | None = None,
) -> int:
    """Do the runs that ``table`` lacks until time is up, and return how many are left."""
    end = time.monotonic() + seconds
    runs = planned(deltas) if runs is None else runs
    for number, (key, iterations) in enumerate(runs, start=1):
        have = done(table.rows()).get(key, -1)
        if have >= iterations:
            continue
        if time.monotonic() > end:
            break
        began = time.monotonic()
        rows = reconstruct(key, deltas[key.module], iterations, dtype)
        table.append(rows[have + 1 :])
        print(
            f"{number}/{len(runs)} {key.module} r={key.rank} k={key.k} {key.init}: error "
            f"{rows[-1]['error']}, LoRA's {rows[-1]['lora_error']}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    finished = done(table.rows())
    return sum(finished.get(key, -1) < iterations for key, iterations in runs)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="output folder of finetune")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for errors.csv")
    parser.add_argument("--float64", action="store_true", help="compute in float64; see the README")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    deltas = tuned_deltas(given.weights)
    table = Table(given.results / "errors.csv", COLUMNS)
    dtype = torch.float64 if given.float64 else torch.float32
    left = fill(table, deltas, dtype=dtype, seconds=60 * given.minutes)
    print(f"{left} runs are left" if left else "all runs are in the table")


if __name__ == "__main__":
    main()
