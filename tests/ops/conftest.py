"""Run operator tests with PyTorch kernels, compiled host code on CPU memory, and on a GPU."""

import pytest


@pytest.fixture(params=["cpu", "host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "host":
        request.getfixturevalue("host").take_over(monkeypatch)
        return "cpu"
    return request.param
