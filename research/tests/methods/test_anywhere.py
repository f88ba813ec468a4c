"""The core's tests that take a method, run over methods of this package."""

from __future__ import annotations

import pytest

import rasa_ext
from rasa_ext.checkpoint.files import read_adapter
from rasa_ext.commands.inspection import read_groups
from rasa_ext.methods import AdapterConfig
from rasa_research import methods
from research.tests.methods import cases  # noqa: F401 - which case() knows
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
from tests.helpers.methods import case
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


STACKED = ["sd-lora", "sd-lora, product", "boosted", "gated-rasa, pruned", "sora, pruned"]


@pytest.mark.parametrize("name", STACKED)
def test_inspect_counts_the_ranks_of_stacks_and_of_pruned_layers(name, tmp_path):
    model = case(name)
    rasa_ext.save_adapter(model, tmp_path)
    groups, other = read_groups(*read_adapter(tmp_path), tmp_path)
    ranks = [[sum(each) for each in group.ranks] for group in groups]
    rows = {row.pattern: (row.L, row.R_min, row.R) for row in rasa_ext.summary(model)}
    found = {g.pattern: (len(r), min(r), max(r)) for g, r in zip(groups, ranks, strict=True)}
    assert found == rows
    assert not other
