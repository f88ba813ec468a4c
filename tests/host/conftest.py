"""What the tests of host code share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch) -> None:
    """The stand-in's tensors are on a CPU, where U would have other strides."""
    module = sys.modules["rasa_ext.ops.dropout"]  # the package has an operator of that name
    monkeypatch.setattr(module, "ranks_first", lambda *_: False)
