"""Seeds, devices, the table of measured figures, and how workers share the files."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command does in a process of its own
os.environ["COLUMNS"] = "200"  # rich takes it once, as it is imported; a worker of -n has 80

pytest.register_assert_rewrite("tests.helpers")

_FIGURE = "figure"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="print what the tests measured")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked readers or engines are for who asks; those marked gpu need a CUDA device."""
    for marker in ("readers", "engines"):
        if marker not in config.getoption("markexpr"):
            _deselect(config, items, marker)
    import torch  # here: the process that only hands out tests to workers needs none

    torch.set_num_threads(1)  # models this small only lose time to waiting threads
    if torch.cuda.is_available():
        return
    _deselect(config, items, "gpu")


def _deselect(config: pytest.Config, items: list[pytest.Item], marker: str) -> None:
    if marked := [item for item in items if item.get_closest_marker(marker)]:
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("figures"):
        return
    reports = [each for kind in terminalreporter.stats.values() for each in kind]
    called = [each for each in reports if getattr(each, "when", None) == "call"]
    terminalreporter.section("measured")
    for name, line in (pair for each in called for pair in each.user_properties):
        if name == _FIGURE:
            terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file is one worker's, so that what its fixtures make is made once."""
    if config.getoption("dist") != "load":  # something else was asked for
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """Leave what libraries have loaded to no collection of garbage.

    accelerate collects whenever training begins, which takes a second for each.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def host():
    """The compiled operators over CPU memory."""
    from tests.helpers import host

    return host.load()


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program to start instead of ``sys.executable`` where what it imports is not the subject."""
    from tests.helpers import forked

    folder = tmp_path_factory.getbasetemp()
    with forked.interpreter(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as it:
        yield it


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Adds a line to the table that --figures prints. A worker's report carries it there."""
    return lambda line: record_property(_FIGURE, line)
