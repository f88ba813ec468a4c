"""The comparison of HashHop and HashChain on a tiny model: a run, the plan, and the tables."""

from __future__ import annotations

import pytest

from research.experiments.planning import run
from research.experiments.planning.run import METHODS, Key, do, pending, report, rows_of
from research.experiments.table import Table
from tests.helpers.tiny_lm import make_model, make_tokenizer

pytest.importorskip("peft")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(run, "STEPS", 3)
    monkeypatch.setattr(run, "BATCH_SIZE", 2)
    monkeypatch.setattr(run, "HELD_OUT", 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_a_row_of_the_table(method, small, tmp_path):
    rows = [do(make_model(), make_tokenizer(), Key(task, method, 0)) for task in run.TASKS]
    table = Table(tmp_path / "runs.csv", run.COLUMNS)
    table.append(rows)
    for row in table.rows():
        assert all(row.values())
        ranks = [float(row[kind]) for kind in run.KINDS]
        bound = 8 if method == "lora-r8" else 9
        assert all(1 <= rank <= bound for rank in ranks)
        assert float(row["effective_rank"]) == pytest.approx(sum(ranks) / len(ranks), abs=1e-3)
        assert float(row["norm"]) > 0
    left = pending(table.rows())
    assert len(left) == 10
    assert Key("hop", method, 0) not in left


def test_both_tasks_have_the_same_tables_and_different_answers():
    tokenizer = make_tokenizer()
    for hop, chain in zip(*(rows_of(task, 5, 0, tokenizer) for task in run.TASKS), strict=True):
        learnt = [sum(label >= 0 for label in row["labels"]) for row in (hop, chain)]
        assert learnt[0] < learnt[1]
        table = tokenizer.decode(hop["input_ids"]).partition("Start")[0]
        assert table == tokenizer.decode(chain["input_ids"]).partition("Start")[0]


def test_the_tables_by_hand():
    rows = [
        {
            **dict.fromkeys(run.COLUMNS, "1"),
            **{"task": task, "method": "lora-r8", "seed": str(seed)},
            "effective_rank": str(rank),
        }
        for task, seed, rank in (("hop", 0, 4), ("chain", 0, 2), ("hop", 1, 3), ("chain", 1, 3))
    ]
    lines = list(report(rows))
    assert "| lora-r8 | hop | 1.00 ± 0.00 | 1.00 ± 0.00 | 3.50 ± 0.71 | 1.00 ± 0.00 | 2 |" in lines
    assert lines[-1].startswith("| lora-r8 | 1.50 ± 0.71 | 1.00 ± 0.00 |")
    assert "| rasa-r8-k1 | hop | - | - | - | - | 0 |" in lines
