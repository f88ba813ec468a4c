"""Functions that adapt only linear layers, on models with stacked experts."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from rasa_research import solver
from tests.helpers.expert_files import RANK, adapted, build, stacks
from tests.helpers.experts import HIDDEN
from tests.helpers.refusals import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*stay untouched", "ignore:.*SGLang")

base = functools.cache(build)
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def states(seed=0):
    """Return a base's tensors, and a copy with every tensor changed."""
    before = {name: t.clone() for name, t in base("mixtral").state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    after = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in before.items()}
    return before, after


def test_compress_tells_what_experts_lost():
    before, after = states()
    model = copy.deepcopy(base("mixtral"))
    found = solver.compress(model, before, after, rank=RANK, k=1, iterations=2)
    names = {name for group in found.plan.groups for name in group.names}
    assert all("experts" not in name for name in names)
    change = (after[STACK].double() - before[STACK].double()).norm().item()
    assert found.lost[STACK].change == pytest.approx(change)
    assert found.residual_share > 0.5  # experts are most of this model
    found.install(model)
    assert not stacks(model)
    assert torch.equal(model.get_parameter(STACK), before[STACK])


def test_fit_adapter_leaves_experts_alone():
    name = "model.layers.0.self_attn.q_proj"
    model = copy.deepcopy(base("mixtral"))
    solver.fit_adapter(model, {name: torch.randn(HIDDEN, HIDDEN)}, RANK, 0, iterations=2)
    assert not stacks(model)
    for deltas in (
        {STACK: torch.randn(5, 48, HIDDEN)},
        {STACK: torch.randn(48, HIDDEN)},
        {name: torch.randn(HIDDEN, HIDDEN), "model.layers.0.mlp.experts": torch.randn(4, 4)},
    ):
        plain = copy.deepcopy(base("mixtral"))
        before = Snapshot(plain)
        with pytest.raises((TypeError, ValueError), match="deltas"):
            solver.fit_adapter(plain, deltas, RANK, 0, iterations=2)
        before.assert_unchanged()
    with pytest.raises((TypeError, ValueError), match="deltas"):
        solver.decompose([torch.randn(5, 48, HIDDEN)], RANK, 0)


def test_a_patched_model_is_refused():
    model = adapted(base("mixtral"), target_modules=r".*\.experts\.\w+")
    before = Snapshot(model)
    for call in (
        lambda: solver.fit_adapter(model, {"lm_head": torch.randn(32, HIDDEN)}, 2, 0),
        lambda: solver.compress(model, *states(), rank=2, k=0),
    ):
        with pytest.raises(ValueError, match="expected an unpatched model"):
            call()
    before.assert_unchanged()
