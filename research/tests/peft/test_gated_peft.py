"""The core's PEFT tests over RaSA with gates, which PEFT trains like RaSA."""

from __future__ import annotations

import pytest

from rasa_research.methods import GatedRasaConfig
from tests.helpers.peft_methods import KNOWN, TRAINED
from tests.peft.test_any_method import (  # noqa: F401 - tests, run here as well
    test_a_step_trains_what_the_method_trains,
    test_files_go_both_ways,
    test_merging_and_export,
)

KNOWN[GatedRasaConfig.method] = (GatedRasaConfig.method, {"alpha": 8.0, "k": 1})
TRAINED[GatedRasaConfig.method] = TRAINED["ranks"]


@pytest.fixture
def case() -> str:
    return GatedRasaConfig.method
