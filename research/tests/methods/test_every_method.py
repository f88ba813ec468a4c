"""The core's tests of any method, run over the methods of this package."""

from __future__ import annotations

import pytest

import rasa_research.methods
from research.tests.methods import cases  # whole: the star brings other CASES, methods
from tests.checkpoint.test_card import test_every_method_s_ranks  # noqa: F401 - run here as well
from tests.helpers.methods import case, rasa_linears
from tests.methods.test_every_method import *  # noqa: F403 - all of them


@pytest.fixture(params=cases.CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def name(request) -> str:
    return request.param


def test_a_case_is_of_this_package(name):
    """If the core's cases or fixture took the place of these, it would fail for all of them."""
    config = next(iter(rasa_linears(case(name)).values())).config
    assert type(config).__module__.startswith("rasa_research.")


def test_every_method_has_cases():
    found = [next(iter(rasa_linears(case(name)).values())).config for name in cases.CASES]
    assert {type(config).__name__ for config in found} == set(rasa_research.methods.__all__)
    assert len(found) == 15
