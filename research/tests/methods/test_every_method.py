"""The core's tests of any method, run over the methods of this package."""

from __future__ import annotations

import pytest

from research.tests.methods.cases import CASES
from tests.checkpoint.test_card import test_every_method_s_ranks  # noqa: F401 - run here as well
from tests.methods.test_every_method import *  # noqa: F403 - all of them


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def name(request) -> str:
    return request.param
