"""Spectra and pool use of adapted experts, against each expert's dense weight change."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import rasa_ext
from rasa_ext.analysis import analyze, analyze_adapter
from tests.helpers import oracle
from tests.helpers.expert_files import adapted, build, of_experts, stacks
from tests.helpers.experts import EXPERTS

base = functools.cache(build)


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("grouping", ["slot", "layer", "shared"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_agrees_with_the_dense_changes(family, grouping, k, tmp_path):
    model = adapted(base(family), grouping, k)
    rasa_ext.save_adapter(model, tmp_path)
    groups = analyze(model)
    plan = [(row.pattern, row.L, row.shape, row.experts) for row in rasa_ext.summary(model)]
    assert [(g.pattern, len(g.weights), g.shape, g.experts) for g in groups] == plan
    found = {}
    for group in groups:
        assert all(len(of) == (group.experts or 1) for of in group.weights)
        found.update({(layer.name, layer.expert): layer for layer in group.layers})
    expected = {
        (name, e): each
        for name, stack in stacks(model).items()
        for e, each in enumerate(of_experts(stack))
    }
    assert {key for key in found if key[1] is not None} == set(expected)
    for key, adapter in expected.items():
        layer, (down, up, d) = found[key], adapter.stacked()
        S = torch.linalg.svdvals(oracle.delta(adapter))[: len(layer.singular_values)]
        torch.testing.assert_close(layer.singular_values, S)
        p = S / S.sum()
        p = p[p > 0]
        assert layer.effective_rank == pytest.approx(math.exp(-(p * p.log()).sum().item()))
        own = adapter.A.shape[0]
        one_by_one = [(up[:, [j]] * d[j] @ down[[j]]).norm().item() for j in range(own, len(d))]
        assert layer.pool_use.tolist() == pytest.approx(one_by_one)
    of_file = {(g.pattern, g.shape, g.experts): g for g in analyze_adapter(tmp_path)}
    assert set(of_file) == {(g.pattern, g.shape, g.experts) for g in groups}
    for ours in groups:
        theirs = of_file[ours.pattern, ours.shape, ours.experts]
        for left, right in zip(ours.layers, theirs.layers, strict=True):
            assert (left.name, left.expert) == (right.name, right.expert)
            assert torch.equal(left.singular_values, right.singular_values)
            assert torch.equal(left.pool_use, right.pool_use)


def test_linear_layers_have_no_expert():
    model = rasa_ext.patch_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), 2, 0)
    (group,) = analyze(model)
    assert group.experts == 0
    assert group.weights == [group.layers]
    assert [layer.expert for layer in group.layers] == [None]


def test_no_matrix_of_a_stack_is_formed(monkeypatch):
    model = adapted(base("mixtral"), "slot")
    shapes = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda t: shapes.append(t.shape) or svdvals(t))
    analyze(model)
    assert len(shapes) >= 3 * EXPERTS * 4
    assert max(max(shape) for shape in shapes) <= 4
