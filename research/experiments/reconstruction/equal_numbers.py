"""Compare the reconstruction by RaSA and LoRA at equal numbers of trainable parameters.

    python -m research.experiments.reconstruction.reconstruct  # once: the errors
    # writes results/equal_numbers.csv and prints a table
    python -m research.experiments.reconstruction.equal_numbers

At equal rank, RaSA's adapter is larger by the diagonal, r-k+L*k parameters per layer. A LoRA with
these parameters could have one more rank in some layers. The layers are assumed to be random: the
error falls linearly with the parameters, from LoRA's minimum at r to LoRA's minimum at r+1.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.records import table as markdown
from research.experiments.reconstruction.deltas import tuned_deltas
from research.experiments.reconstruction.figures import against_k, curves
from research.experiments.reconstruction.finetune import RESULTS, WEIGHTS
from research.experiments.reconstruction.reconstruct import COLUMNS as ERRORS
from research.experiments.reconstruction.reconstruct import RANKS
from research.experiments.table import Table

COLUMNS = ("module", "rank", "k", "extra_ranks", "error", "lora_error", "lora_error_equal")


def spectrum(deltas: Sequence[Tensor]) -> Tensor:
    """Return how much each rank reduces LoRA's relative error, summed over layers, in float64."""
    squares = sum(torch.linalg.svdvals(delta).double().square() for delta in deltas)
    return squares / squares.sum()


def lora_errors(values: Tensor, rank: int, extra: float) -> tuple[float, float]:
    """Return LoRA's minimum error at ``rank`` and at ``rank + extra``, which may be fractional."""
    at = values[rank:].sum().item()
    whole = int(extra)
    beyond = values[rank : rank + whole].sum() + (extra - whole) * values[rank + whole]
    return at, at - beyond.item()


def compare(
    module: str, deltas: Sequence[Tensor], errors: Mapping[int, Mapping[int, float]]
) -> list[dict[str, object]]:
    """Return the rows of a module type; ``errors`` has RaSA's errors by rank and k."""
    values, (out, width), layers = spectrum(deltas), deltas[0].shape, len(deltas)
    rows = []
    for rank, by_k in errors.items():
        for k, error in by_k.items():
            if not k:
                continue
            extra = (rank - k + layers * k) / (out + width)
            at, equal = lora_errors(values, rank, extra)
            rows.append(
                {
                    "module": module,
                    "rank": rank,
                    "k": k,
                    "extra_ranks": f"{extra:.4f}",
                    "error": f"{error:.7g}",
                    "lora_error": f"{at:.7g}",
                    "lora_error_equal": f"{equal:.7g}",
                }
            )
    return rows


def shown(rows: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
    """Make a table of RaSA's error over LoRA's, one row per module type and rank."""
    lines: dict[tuple[str, str], dict[str, object]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["module"], row["rank"]), {"module": row["module"], "r": row["rank"]}
        )
        line[f"k={row['k']}"] = f"{float(row['error']) / float(row['lora_error_equal']):.4f}"
    return list(lines.values())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="output folder of finetune")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of errors.csv")
    given = parser.parse_args()
    found, _ = curves(Table(given.results / "errors.csv", ERRORS).rows())
    deltas = tuned_deltas(given.weights)
    path = given.results / "equal_numbers.csv"
    path.unlink(missing_ok=True)
    table = Table(path, COLUMNS)
    for module, changes in deltas.items():
        errors = {rank: against_k(found, module, rank, "svd") for rank in RANKS}
        table.append(compare(module, changes, errors))
    print(markdown(shown(table.rows())))


if __name__ == "__main__":
    main()
