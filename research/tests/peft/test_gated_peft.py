"""RaSA with gates under PEFT, which trains it as RaSA: the core's tests over it."""

from __future__ import annotations

import pytest

from rasa_research import methods
from tests.peft.test_methods import (  # noqa: F401 - tests, run here as well
    KNOWN,
    test_it_trains_what_the_method_trains,
    test_merged,
    test_saved_it_is_the_package_s_own_adapter,
)

KNOWN["gated-rasa"] = ({"rasa_k": 1}, methods.GatedRasaConfig(4, 1))


@pytest.fixture
def name() -> str:
    return "gated-rasa"
