"""Fixtures and hooks for all tests: seeds, devices, measured figures, distribution to workers."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line does
os.environ["COLUMNS"] = "200"  # rich reads it on import; a worker of -n would have 80

pytest.register_assert_rewrite("tests.helpers")

_FIGURE = "figure"
# These run first: a fork is safe only before other tests have started threads.
_FORKING = ("tests/checkpoint/test_atomic.py", "tests/checkpoint/test_fuzz.py")
# These would otherwise run last, beside an idle worker.
_LONGEST = ("tests/examples/", "tests/walks/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="print what the tests measured")
    parser.addoption("--walks", type=int, default=100, help="random walks of each kind")
    parser.addoption("--threads", type=int, default=1, help="of PyTorch; sums then round otherwise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect readers and engines unless -m names them, and gpu without a CUDA device."""
    for marker in ("readers", "engines"):
        if marker not in config.getoption("markexpr"):
            _deselect(config, items, marker)
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))
    items.sort(key=lambda item: not item.nodeid.startswith(_FORKING))
    import torch  # here, because the process that only distributes tests needs no torch

    torch.set_num_threads(config.getoption("threads", 1))  # more make small models slower
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
    """Run all tests of a file in one worker, so that module fixtures are created once."""
    if config.getoption("dist") != "load":  # the user chose another one
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files with many tests first, which are not the longest
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection.

    accelerate collects garbage at the start of every training, which would take a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def host():
    """The compiled host code as operators on CPU memory."""
    from tests.helpers import host

    return host.load()


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program to start instead of ``sys.executable``, with the libraries already imported."""
    from tests.helpers import forked

    folder = tmp_path_factory.getbasetemp()
    with forked.interpreter(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as it:
        yield it


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, which outlives what the test makes.

    A DDP reducer that held the last reference would wait, with Python's lock, for gloo's thread,
    which waits for that lock to free a tensor.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    yield
    dist.destroy_process_group()
    del group


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """A function that adds a line to the table printed by --figures, also from a worker."""
    return lambda line: record_property(_FIGURE, line)
