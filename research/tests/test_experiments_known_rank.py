"""Targets of known rank: the changed facts, the held-out rows, and runs on tiny models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from research.experiments.compare.config import BASE, read_config
from research.experiments.compare.methods import prepared
from research.experiments.compare.run import COLUMNS
from research.experiments.known_rank import report, run, targets
from research.experiments.known_rank.targets import VALUES, facts, make_base, make_target
from research.experiments.table import Table


def pairs(rows):
    """Return the values by keys, and the noise tokens."""
    return {tuple(r["input_ids"][1:3]): r["input_ids"][3] for r in rows}, {
        r["input_ids"][0] for r in rows
    }


def test_a_permutation_has_the_rank_and_its_facts_are_apart():
    known = {(a, b): value for a, b, value in facts(3)}
    task = make_target("permute", 16, 3)
    (train, seen), (dev, _), (test, unseen), (other, _) = map(
        pairs, (task.train, task.dev, task.test, task.other)
    )
    assert not seen & unseen
    assert not train.keys() & (dev.keys() | test.keys() | other.keys())
    assert not dev.keys() & test.keys()
    everything = train | dev | test | other
    assert everything.keys() == known.keys()
    assert all(other[keys] == known[keys] for keys in other)
    moved = torch.zeros(VALUES, VALUES)
    for keys, value in everything.items():
        moved[value - 1, known[keys] - 1] = 1
    assert torch.equal(moved.sum(0), torch.ones(VALUES))  # the keys do not matter
    assert torch.linalg.matrix_rank(moved - torch.eye(VALUES)) == 16
    assert len(dev) == len(test) == 17
    assert {known[keys] for keys in test} <= {known[keys] for keys in train}


def test_new_values_are_those_of_so_many_facts():
    known = {(a, b): value for a, b, value in facts(3)}
    task = make_target("values", 32, 3)
    (train, seen), (test, unseen), (other, _) = map(pairs, (task.train, task.test, task.other))
    assert not seen & unseen
    assert sum(train[keys] != known[keys] for keys in train) == 32
    assert len(test) == 32
    assert all(test[keys] == train[keys] != known[keys] for keys in test)
    assert all(other[keys] == known[keys] for keys in other)
    assert not other.keys() & train.keys()
    assert task == make_target("values", 32, 3)
    for kind, rank, message in (("swap", 1, "kind: expected one of"), ("values", 64, "rank: ")):
        with pytest.raises(ValueError, match=message):
            make_target(kind, rank, 0)


def test_runs_and_report(tmp_path, monkeypatch, capsys):
    short = dataclasses.replace(targets.BASE_RECIPE, steps=2)
    monkeypatch.setattr(targets, "BASE_RECIPE", short)
    with pytest.raises(ValueError, match=r"base: expected a loss of at most 0.01 on the facts"):
        make_base(2, 0, tmp_path)
    monkeypatch.setattr(targets, "BASE_LOSS", 99)
    given = yaml.safe_load(run.CONFIG.read_text())
    given |= {"steps": 2, "seeds": [0, 1], "tasks": ["permute-L2"], "ladder": []}
    given["methods"] = {name: given["methods"][name] for name in ("lora-r2", "rasa-r2-k2")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    words = ["--config", str(path), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["run", *words, "--state", str(tmp_path)])
    run.main()
    rows = Table(tmp_path / "runs.csv", COLUMNS).rows()
    assert len(rows) == 1 + 2 * 3 + 2
    assert len({row["test_loss"] for row in rows}) == len(rows)
    assert [path.name for path in sorted(tmp_path.glob("known-rank/*"))] == [
        "depth2-seed0.pt",
        "depth2-seed1.pt",
    ]
    again = make_base(2, 1, tmp_path / "known-rank")
    assert not any(p.requires_grad for p in again.parameters())
    monkeypatch.setattr("sys.argv", ["report", *words])
    report.main()
    monkeypatch.setattr("sys.argv", ["report", *words, "--all"])
    report.main()
    assert "| rasa-r2-k2 | lora-r2 | 2 |" in capsys.readouterr().out
    table = report.rank_table(read_config(path, run.TASKS), rows, "permute-L2")
    assert [line["r"] for line in table] == [2]
    assert table[0]["lower at"] in ("0 of 2", "1 of 2", "2 of 2")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    path.rename(tmp_path / "other.yaml")
    words[1] = str(tmp_path / "other.yaml")
    (tmp_path / "loss.png").write_bytes(b"of config.yaml")
    monkeypatch.setattr("sys.argv", ["report", *words])
    report.main()
    assert (tmp_path / "loss.png").read_bytes() == b"of config.yaml"
    assert (tmp_path / "other-loss.png").is_file()


def test_the_shipped_config_pairs_equal_numbers(tmp_path, monkeypatch):
    config = read_config(run.CONFIG, run.TASKS)
    assert len(config.seeds) == 10
    monkeypatch.setattr(targets, "BASE_LOSS", 99)
    monkeypatch.setattr(targets, "BASE_RECIPE", dataclasses.replace(targets.BASE_RECIPE, steps=1))
    short = dataclasses.replace(config, steps=dict.fromkeys(config.tasks, 1))
    bench = run.KnownRank(short, tmp_path, tmp_path)
    trained = {
        name: bench.do(run.Key("values-L6", name, 1e-2, 0))["trainable"]
        for name in (*config.methods, BASE)
    }
    for name, spec in config.methods.items():
        for against in spec["against"]:
            assert trained[name] == pytest.approx(trained[against], rel=0.02)


def test_a_lora_goes_on_from_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "BASE_LOSS", 99)
    monkeypatch.setattr(targets, "BASE_RECIPE", dataclasses.replace(targets.BASE_RECIPE, steps=1))
    config = read_config(run.HERE / "continued.yaml", run.TASKS)
    specs = {name: dict(spec) for name, spec in config.methods.items() if name.endswith("-r2")}
    for spec in specs.values():
        spec["before"] = {"steps": 3, "lr": 1e-2}
    bench = run.KnownRank(dataclasses.replace(config, methods=specs), tmp_path, tmp_path)
    base = targets.make_base(2, 0, tmp_path / "known-rank")
    ids = torch.arange(1, 33).reshape(4, 8)
    plain, losses, trained = base(ids).logits, {}, {}
    for name, spec in specs.items():
        key = run.Key("values-L2", name, 1e-2, 0)
        start = bench.base_of(key)
        model = prepared(start, spec, 0, bfloat16=False)
        assert start is bench.base_of(key)  # a run changes a copy
        error = (model(ids).logits - start(ids).logits).abs().max()
        moved = (start(ids).logits - plain).abs().max()
        assert error < 1e-3 * moved
        row = bench.do(key)
        losses[name], trained[name] = row["test_loss"], row["trainable"]
        lora = {"kind": "lora", "rank": 2, "alpha": 2, "targets": ["down_proj"]}
        rounded = prepared(base, lora, 0, bfloat16=True)
        goes_on = prepared(rounded, spec, 0, bfloat16=True)
        assert {p.dtype for p in goes_on.parameters() if p.requires_grad} == {torch.float32}
    assert len(set(losses.values())) == len(losses)
    assert trained["wider-r2"] == 2 * trained["on-r2"] == 2 * trained["stopped-r2"]
    assert trained["rasa-r2"] == trained["on-r2"] + 2 * 2 * 2  # d: L * k in each of the L layers
    with pytest.raises(ValueError, match="as: expected lora, rasa or wider"):
        prepared(bench.base_of(key), spec | {"as": "dora"}, 0, bfloat16=False)
