"""Check the theorem and the descent on the fine-tune's weight changes, in float64.

    python -m research.experiments.reconstruction.finetune  # once: the weight changes
    # writes results/half_steps.csv and prints the table
    python -m research.experiments.reconstruction.half_steps

For every module type, k and start, the error is measured after each of the four half-steps of every
iteration. No half-step may raise the error. From the theorem's start, the last error must not
exceed LoRA's minimum, which is computed from dense singular values. The command fails if either
check fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import table as markdown
from rasa_research.solver.coordinate_descent import CoordinateDescent
from rasa_research.solver.low_rank import Matrix, truncated_svd
from research.experiments.reconstruction.deltas import tuned_deltas
from research.experiments.reconstruction.equal_numbers import spectrum
from research.experiments.reconstruction.finetune import RESULTS, WEIGHTS
from research.experiments.table import Table

COLUMNS = (
    *("module", "rank", "k", "start", "half_steps", "largest_rise"),
    *("first", "last", "lora_error"),
)
STEPS = ("update_private", "update_pool_B", "update_pool_A", "update_d")
RANK, KS, ITERATIONS = 8, (1, 4, 8), 5
ROUNDING = 1e-12
"""Largest rise that counts as rounding: errors are float64 sums of squares with a total of one."""


def check(
    module: str, deltas: Sequence[Tensor], lora: float, k: int, start: str, iterations: int
) -> dict[str, Any]:
    """Do one run and return its row, with errors relative to the squared norm.

    ``lora`` is LoRA's minimum.
    """
    norm = sum(delta.double().square().sum().item() for delta in deltas) ** 0.5
    targets = [delta.double() / norm for delta in deltas]
    descent = CoordinateDescent([Matrix(target) for target in targets], RANK - k, k * len(targets))
    if start == "svd":
        generator = torch.Generator().manual_seed(0)
        descent.start_from_theorem([truncated_svd(Matrix(t), RANK, generator) for t in targets], k)
    else:
        torch.manual_seed(0)
        descent.start_at_random()
    errors = [descent.error()]
    for _ in range(iterations):
        for step in STEPS:
            getattr(descent, step)()
            errors.append(descent.error())
    rises = [after - before for before, after in pairwise(errors)]
    return {
        "module": module,
        "rank": RANK,
        "k": k,
        "start": start,
        "half_steps": len(rises),
        "largest_rise": f"{max(rises):.2e}",
        "first": f"{errors[0]:.8f}",
        "last": f"{errors[-1]:.8f}",
        "lora_error": f"{lora:.8f}",
    }


def broken(row: dict[str, Any]) -> str | None:
    """Return how a row contradicts the theorem or the descent, or None if it does not."""
    if float(row["largest_rise"]) > ROUNDING:
        return f"a half-step raised the error by {row['largest_rise']}"
    if row["start"] == "svd" and float(row["last"]) > float(row["lora_error"]) + 1e-8:
        return f"the error {row['last']} is above LoRA's minimum {row['lora_error']}"
    return None


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="output folder of finetune")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for half_steps.csv")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    given = parser.parse_args()
    deltas = tuned_deltas(given.weights)
    path = given.results / "half_steps.csv"
    path.unlink(missing_ok=True)
    table, wrong = Table(path, COLUMNS), []
    for module, changes in deltas.items():
        lora = spectrum([change.double() for change in changes])[RANK:].sum().item()
        for k in KS:
            for start in ("svd", "random"):
                row = check(module, changes, lora, k, start, given.iterations)
                table.append([row])
                print(row, flush=True)
                if why := broken(row):
                    wrong.append(f"{module} k={k} {start}: {why}")
    print(markdown(table.rows()))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
