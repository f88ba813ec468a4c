"""Adapters of this package's methods, damaged like the core's in tests/checkpoint/fuzz.py."""

from __future__ import annotations

from pathlib import Path

import rasa_research
from research.tests.methods import cases  # noqa: F401 - which makes them known
from tests.checkpoint import fuzz

METHODS = (
    "boosted",
    "boosted pool",
    "block-lora",
    "sbora-fa",
    "gated-rasa, pruned",
    "sora, pruned",
    "reslora",
    "sd-lora",
)
HOSTILE = {
    "rasa_kept": ({"0.up_proj": [10**8, 10**8, 10**8]}, {"0.up_proj": [10**9, 1, 1]}),
    "rasa_stack": ({"0.up_proj": 10**8}, {"0.up_proj": 2**31}),
    "rasa_past": ([10**8], [1] * 10**5),
}
FIELDS = (*HOSTILE, "rasa_gates", "rasa_window", "rasa_seed", "rasa_side", "rasa_blocks")
FIELDS += ("rasa_norm", "rasa_tied", "adapters")


def test_damaged_folders_are_refused_in_a_sentence_or_load_whole(tmp_path, monkeypatch):
    packages = (fuzz.PACKAGE, str(Path(rasa_research.__file__).parent))
    monkeypatch.setattr(fuzz, "PACKAGE", packages)
    monkeypatch.setattr(fuzz, "HOSTILE", {**fuzz.HOSTILE, **HOSTILE})
    monkeypatch.setattr(fuzz, "FIELDS", (*fuzz.FIELDS, *FIELDS))
    monkeypatch.setattr(fuzz, "KINDS", {name: fuzz._of_method(name) for name in METHODS})
    monkeypatch.chdir(tmp_path)
    found = fuzz.fuzz(200, 20261127, tmp_path)
    assert [number for number, *_ in found] == list(range(200))
    assert not [each for each in found if each[3] in fuzz.NEVER]
    outcomes = [outcome for *_, outcome, _ in found]
    assert outcomes.count(fuzz.OWN) > 100
    assert outcomes.count(fuzz.EQUAL) > 10
