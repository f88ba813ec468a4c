"""Run a few hundred fuzzer cases, and check that the fuzzer detects each kind of fault."""

import itertools
import os
import signal

import pytest
import torch

from rasa_ext.methods.base import checked_rank
from tests.checkpoint import fuzz


def test_damaged_folders_are_refused_in_a_sentence_or_load_whole(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    cases = 3 * request.config.getoption("walks")
    found = fuzz.fuzz(cases, 20261127, tmp_path)
    assert [number for number, *_ in found] == list(range(cases))
    assert not [each for each in found if each[3] in fuzz.NEVER]
    outcomes = [outcome for *_, outcome, _ in found]
    assert outcomes.count(fuzz.OWN) > cases * 2 / 3
    assert outcomes.count(fuzz.EQUAL) > cases / 15


def half(base, folder):
    with torch.no_grad():
        base[0].up_proj.weight.zero_()
    checked_rank(0)


FAULTS = {
    fuzz.RAW: lambda base, folder: {}["key"],
    fuzz.HALF: half,
    fuzz.OUTSIDE: lambda base, folder: (folder.parent / "outside" / "mine").write_text("theirs"),
    fuzz.HANG: lambda base, folder: any(itertools.repeat(False)),  # for ever
    fuzz.OUT_OF_MEMORY: lambda base, folder: torch.zeros(1 << 36),
    fuzz.CRASH: lambda base, folder: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_sees_each_fault(fault, tmp_path, monkeypatch):
    """Given a reader that fails this way on damaged folders, the fuzzer reports it."""

    def reader(base, folder):
        if folder.parent.name == "case":
            FAULTS[fault](base, folder)
        return base

    kind = fuzz.Kind(fuzz.KINDS["rasa"].write, fuzz.KINDS["rasa"].base, reader)
    monkeypatch.setattr(fuzz, "KINDS", {"rasa": kind})
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    found = fuzz.fuzz(2, 1, tmp_path)
    assert {outcome for *_, outcome, _ in found} == {fault}
