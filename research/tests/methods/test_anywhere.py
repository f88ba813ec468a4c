"""The core's tests that take a method, run over methods of this package."""

from __future__ import annotations

import pytest

from rasa_ext.methods import AdapterConfig
from rasa_research import methods
from tests.analysis.test_analysis import (  # noqa: F401 - run here as well
    test_a_file_is_analyzed_by_its_method,
    test_a_file_that_does_not_tell_shapes_wants_the_base,
)
from tests.checkpoint.test_ways_out import (  # noqa: F401
    test_features_that_a_layer_has_not,
)
from tests.commands.test_cli_inspect import (  # noqa: F401
    test_methods_whose_files_need_the_base_for_shapes,
)
from tests.patching.test_trained_tokens import test_every_method_takes_it  # noqa: F401


@pytest.fixture(
    params=[methods.BlockLoraConfig(rank=4, blocks=2), methods.SoraConfig(rank=3)],
    ids=lambda config: config.method,
)
def config(request) -> AdapterConfig:
    return request.param


@pytest.fixture(
    params=[
        methods.SboraConfig(4, side="A"),
        methods.SboraConfig(4, side="B"),
        methods.ResLoraConfig(4, window=1),
        methods.BoostedPoolConfig(rank=2),
    ],
    ids=["sbora, a", "sbora, b", "reslora", "boosted pool"],
)
def shapeless(request) -> AdapterConfig:
    return request.param


@pytest.fixture
def indexed() -> AdapterConfig:
    return methods.SboraConfig(rank=4)


@pytest.fixture(params=[methods.SboraConfig, methods.SdLoraConfig])
def method(request) -> type[AdapterConfig]:
    return request.param
