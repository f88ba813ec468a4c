"""The command ranks: from a model and a data file to a table and a rank_pattern."""

from __future__ import annotations

import json
import re

import pytest
import torch

from rasa_research.ranks import block_ranks, hidden_dimensions, rank_pattern
from research.experiments.hashes import hash_hop
from tests.helpers.cli import invoke, load
from tests.helpers.tiny_lm import make_tokenizer, save_base, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "hops.jsonl", hash_hop(40, 2, pairs=3))


def by_hand(base, records, k, pooling):
    """Compute dimensions and ranks from one text at a time, so without padding."""
    tokenizer, model = make_tokenizer(), load(base)
    batches = []
    for record in records:
        turns = [{"role": "user", "content": record["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + record["completion"])["input_ids"]
        batches.append({"input_ids": torch.tensor([ids])})
    dimensions = hidden_dimensions(model, batches, pooling=pooling)
    return dimensions, block_ranks(dimensions, k), model


@pytest.mark.parametrize(("k", "pooling"), [(1, "mean"), (2, "last")])
def test_the_table_and_the_file(k, pooling, base, data, tmp_path):
    path = tmp_path / "new" / "ranks.json"
    text = invoke("ranks", base, data, "--k", k, "--pooling", pooling, "--output", path)
    dimensions, ranks, model = by_hand(base, hash_hop(40, 2, pairs=3), k, pooling)
    found = json.loads(path.read_text())
    assert found["dimensions"] == pytest.approx(dimensions, rel=1e-3)
    assert found["ranks"] == ranks
    assert found["blocks"] == ["model.layers.0", "model.layers.1"]
    assert found["rank_pattern"] == rank_pattern(model, ranks)
    assert (found["pooling"], found["k"], found["points"]) == (pooling, k, 40)
    assert (found["model"], found["data"]) == (str(base), str(data))
    rows = re.search(
        r"40 examples of \S+ dimension rank model.layers.0 (\S+) (\d+) model.layers.1 (\S+) (\d+) "
        r"after the last block (\S+)",
        text,
    )
    told = [float(rows[i]) for i in (1, 3, 5)]
    assert told == pytest.approx(found["dimensions"], abs=0.005)
    assert [int(rows[2]), int(rows[4])] == ranks


def test_options_reach_what_they_are_for(base, data, tmp_path):
    path = tmp_path / "ranks.json"

    def planned(*options):
        invoke("ranks", base, data, "--output", path, *options)
        return json.loads(path.read_text())

    whole = planned()
    assert planned("--batch-size", 3)["dimensions"] == pytest.approx(whole["dimensions"], rel=1e-3)
    assert planned("--points", 20)["points"] == 20
    few = [planned("--points", 20, "--seed", seed)["dimensions"] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert planned("--no-template")["dimensions"] != whole["dimensions"]
    assert planned("--seq-len", 12)["dimensions"] != whole["dimensions"]
    assert planned("--blocks", "model.layers")["dimensions"] == whole["dimensions"]
    some = planned("--target-modules", "q_proj,v_proj")["rank_pattern"]
    assert len(some) == 4
    assert some.items() <= whole["rank_pattern"].items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pooling", "max"], "pooling: expected one of ('mean', 'last', 'first'), got 'max'."),
        (["--points", 2], "points: expected at least 3, got 2."),
        (["--k", 0], "k: expected at least 1, got 0."),
        (["--blocks", "model.norm"], "got 'model.norm': a LlamaRMSNorm."),
        (
            ["--blocks", "h"],
            "blocks: expected the name of a ModuleList, such as model.layers, got 'h'",
        ),
        (["--target-modules", "nothing"], "target_modules: expected names of linear layers"),
        (["--pooling", "first"], "expected at least 3 different points, got 1 of 40"),
    ],
)
def test_bad_options(options, message, base, data, tmp_path):
    path = tmp_path / "ranks.json"
    assert message in invoke("ranks", base, data, "--output", path, *options, code=1)
    assert not path.exists()


def test_bad_data(base, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 5)
    text = invoke("ranks", base, data, code=1)
    assert "cannot be estimated: expected at least 3 different" in text
    assert "does not exist" in invoke("ranks", base, tmp_path / "none.jsonl", code=1)
