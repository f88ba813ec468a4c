"""Run GPU tests on a CUDA device, and on the CPU with the same operators compiled for it."""

import pytest

from rasa_ext import ops
from tests.helpers import cuda


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CUDA device, or the CPU with compiled operators and a GPU's heuristics."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("host").take_over(monkeypatch)
    return "cpu"


@pytest.fixture(params=[False, True], ids=["alone", "fused"])
def fused(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether projections of one input are computed together; overrides the heuristic."""
    monkeypatch.setattr(ops, "fuse_projections", lambda *_: request.param)
    return request.param


@pytest.fixture
def streams(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.cuda's streams and graphs by stand-ins on a CPU."""
    if device == "cpu":
        cuda.stand_in(monkeypatch)
