"""The fixtures and collection hooks of the core's tests."""

from tests.conftest import (  # noqa: F401
    _frozen_heap,
    _seed,
    device,
    figure,
    forked_python,
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
)
