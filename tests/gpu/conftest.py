"""A CUDA device, or the same operators compiled for CPU memory where there is none."""

from __future__ import annotations

import pytest

from rasa_ext import ops
from tests.helpers import cuda


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU stands in with the compiled operators and a GPU's heuristics."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("host").take_over(monkeypatch)
    return "cpu"


@pytest.fixture(params=[False, True], ids=["alone", "fused"])
def fused(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether projections of one input are computed together, whatever the heuristic says."""
    monkeypatch.setattr(ops, "fuse_projections", lambda *_: request.param)
    return request.param


@pytest.fixture
def streams(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda has streams and graphs, on a CPU stand-ins for them."""
    if device == "cpu":
        cuda.stand_in(monkeypatch)
