"""Tests of other folders that only a GPU runs: here over the stand-ins, so that none has a slip."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import cuda
from tests.nn import test_graphs as graphs


def cases(module: ModuleType) -> Iterator[tuple[Callable, dict[str, Any]]]:
    """Every test of a module, with each of its parameters' values."""
    for name, test in vars(module).items():
        if name.startswith("test_"):
            marks = getattr(test, "pytestmark", ())
            values = [mark.args for mark in marks if mark.name == "parametrize"]
            names = [name for name, _ in values]
            for chosen in itertools.product(*(each for _, each in values)):
                yield test, dict(zip(names, chosen, strict=True))


@pytest.mark.parametrize(
    ("test", "arguments"), [pytest.param(*case, id=case[0].__name__) for case in cases(graphs)]
)
def test_graphs(test, arguments, host, monkeypatch):
    host.take_over(monkeypatch)
    cuda.stand_in(monkeypatch)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    test(**arguments)
