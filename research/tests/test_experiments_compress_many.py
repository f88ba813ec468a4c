"""The experiment with LoRAs over one basis: LoRAs with a known answer, and the table."""

from __future__ import annotations

import functools

from research.experiments.compress_many import run


def test_a_common_basis(monkeypatch):
    monkeypatch.setattr(run, "BASES", {"made": (8,)})
    make = functools.partial(run.made, shared=8, count=3, out=20, width=16)
    (row,) = run.measure("made, of a test", make)
    assert set(row) == set(run.COLUMNS)
    assert float(row["error"]) < 1e-4 < float(row["apart"])
    assert row["numbers"] == f"{(20 + 16 + 3) / (3 * (20 + 16)):.4f}"
    cells = run.report([{k: str(v) for k, v in row.items()}]).splitlines()[-1].split(" | ")
    assert cells[0] == "| 3 made, of a test"
