"""Damaged adapters of this package's methods, as tests/checkpoint/fuzz.py damages the core's."""

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


def test_damaged_folders_are_refused_in_a_sentence_or_load_whole(tmp_path, monkeypatch):
    packages = (fuzz.PACKAGE, str(Path(rasa_research.__file__).parent))
    monkeypatch.setattr(fuzz, "PACKAGE", packages)
    monkeypatch.setattr(fuzz, "KINDS", {name: fuzz._of_method(name) for name in METHODS})
    monkeypatch.chdir(tmp_path)
    found = fuzz.fuzz(200, 20261127, tmp_path)
    assert [number for number, *_ in found] == list(range(200))
    assert not [each for each in found if each[3] in fuzz.NEVER]
    outcomes = [outcome for *_, outcome, _ in found]
    assert outcomes.count(fuzz.OWN) > 100
    assert outcomes.count(fuzz.EQUAL) > 10
