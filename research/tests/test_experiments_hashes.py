"""Hash tasks: answers equal a separate solver's, seeds fix the records, no short cut works."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from rasa_ext.commands.data import read_examples, write_examples
from research.experiments.hashes import hash_chain, hash_hop

KINDS = [hash_hop, hash_chain]
SIZES = [(1, 2), (3, 8), (5, 6)]


def parsed(prompt: str) -> tuple[dict[str, str], str, int]:
    *lines, task = prompt.splitlines()
    pairs = [re.fullmatch("([a-z]{4})=([a-z]{4})", line).groups() for line in lines]
    start, hops = re.match(r"Start at ([a-z]{4}) and go (\d+) steps\. ", task).groups()
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs), start, int(hops)


@pytest.mark.parametrize(("hops", "pairs"), SIZES)
def test_answers_follow_the_table(hops, pairs):
    for hop, chain in zip(
        hash_hop(50, hops, pairs=pairs), hash_chain(50, hops, pairs=pairs), strict=True
    ):
        table, now, steps = parsed(hop["prompt"])
        assert (len(table), steps) == (pairs, hops)
        written = ""
        for _ in range(steps):
            written += f" {now}={table[now]}"
            now = table[now]
        assert hop["completion"] == f" {now}"
        assert chain["completion"] == written
        assert chain["prompt"].rpartition(". ")[0] == hop["prompt"].rpartition(". ")[0]
        assert chain["prompt"] != hop["prompt"]


@pytest.mark.parametrize(("hops", "pairs"), SIZES)
def test_the_table_gives_nothing_away(hops, pairs):
    places = []
    for record in hash_hop(400, hops, pairs=pairs):
        table, start, _ = parsed(record["prompt"])
        assert set(table) == set(table.values())  # every hash is on both sides
        met = [start]
        while (following := table[met[-1]]) != start:
            met.append(following)
        assert len(met) == pairs
        places.append(list(table).index(start))
    for place in range(pairs):  # each place is a start 400 / pairs times, within 5 sigma
        mean = 400 / pairs
        assert abs(places.count(place) - mean) < 5 * mean**0.5


@pytest.mark.parametrize("make", KINDS)
def test_the_same_arguments_give_the_same_in_any_process(make):
    code = (
        f"from research.experiments.hashes import {make.__name__}\n"
        f"print({make.__name__}(9, 3, seed=5))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = make(9, 3, seed=5)
    assert other.stdout.strip() == repr(found)
    assert make(4, 3, seed=5) == found[:4]
    prompts = {record["prompt"] for seed in range(5) for record in make(100, 3, seed=seed)}
    assert len(prompts) == 500


@pytest.mark.parametrize("make", KINDS)
def test_records_are_data_for_training(make, tmp_path):
    write_examples(tmp_path / "data.jsonl", make(5, 2))
    assert read_examples(str(tmp_path / "data.jsonl")) == make(5, 2)


@pytest.mark.parametrize("make", KINDS)
def test_bad_arguments(make):
    for message, words in (
        ("count: expected 0 or more, got -1", (-1, 2)),
        ("hops: expected at least 1, got 0", (1, 0)),
        ("pairs: expected more than the 4 hops, got 4", (1, 4, 0, 4)),
    ):
        with pytest.raises(ValueError, match=message):
            make(*words)
    assert make(0, 1) == []
