"""Train small models on new tasks of known rank, with LoRA and RaSA at every rank.

    # writes results/runs.csv, one row per finished run
    python -m research.experiments.known_rank.run [--minutes M]
    python -m research.experiments.known_rank.report  # tables and a plot of runs.csv

A new start continues with the runs that the table lacks; two processes share the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from research.experiments.compare.config import Config, Key, pending, read_config
from research.experiments.compare.run import COLUMNS, Bench, arguments, work
from research.experiments.known_rank.targets import PAD, make_base, make_target
from research.experiments.table import Table
from research.experiments.tasks import Task

HERE = Path(__file__).parent
CONFIG, RESULTS = HERE / "config.yaml", HERE / "results"
RANKS, DEPTHS = {"permute": 16, "values": 32}, (2, 4, 6)
TASKS = {f"{kind}-L{depth}": (kind, depth) for depth in DEPTHS for kind in RANKS}
"""Kind of the target and depth of the model, by the task's name."""


class KnownRank(Bench):
    """Models of several depths; the run's seed determines their facts and new tasks."""

    def __init__(self, config: Config, results: Path, state: Path) -> None:
        """Set the folders; ``state`` has the base models, which are made on first use."""
        self.config, self.results, self.state, self.pad = config, results, state, PAD
        self.tokenizer, self.other = None, []
        self._loras: dict[tuple[object, ...], Any] = {}

    def task_of(self, key: Key) -> Task:
        """Return the target task for the run's kind and seed."""
        kind, _ = TASKS[key.task]
        return make_target(kind, RANKS[kind], key.seed)

    def base_of(self, key: Key) -> Any:
        """Return a model of the run's depth that has learnt the facts of the run's seed."""
        base = make_base(TASKS[key.task][1], key.seed, self.state / "known-rank")
        return self.with_lora(base, key, targets=["down_proj"])


def main() -> None:
    """Run the command."""
    given = arguments(__doc__, CONFIG, RESULTS).parse_args()
    config = read_config(given.config, TASKS)
    table = Table(given.results / "runs.csv", COLUMNS)
    if given.list:
        print("\n".join(map(str, pending(config, table.rows()))))
        return
    work(KnownRank(config, given.results, given.state), table, given.minutes)


if __name__ == "__main__":
    main()
