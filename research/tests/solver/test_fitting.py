"""fit_adapter patches a model with adapters that decompose given weight changes."""

from __future__ import annotations

import pytest
import torch

import rasa_ext
from rasa_research import solver
from tests.helpers import oracle
from tests.helpers.adapters import adapters, pool_members
from tests.helpers.models import FAMILIES, GPT2, LLAMA, SEQUENTIAL, ids
from tests.helpers.refusals import Snapshot
from tests.helpers.unet import ENDS, Unet, by_end, groups_by


def changes(base, names, seed=0):
    """Return random weight changes (out, in) that share a part of their spaces."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        out, width = oracle.weight_shape(base.get_submodule(name))
        common = torch.Generator().manual_seed(7)
        left, right = (torch.randn(n, 6, generator=common) for n in (out, width))
        left, right = (t + torch.randn(t.shape, generator=g) for t in (left, right))
        found[name] = 0.01 * left @ right.T + 0.001 * torch.randn(out, width, generator=g)
    return found


def tail(deltas, rank):
    total = sum(M.double().square().sum() for M in deltas)
    return sum(torch.linalg.svdvals(M.double())[rank:].square().sum() for M in deltas) / total


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("entry", [*FAMILIES, SEQUENTIAL], ids=ids)
def test_adapters_approximate_the_changes_group_by_group(entry, k):
    base = entry.build()
    deltas = changes(base, entry.targets(base))
    found = solver.fit_adapter(base, deltas, 4, k, iterations=8)
    learnt = {name: oracle.delta(adapter) for name, adapter in adapters(base).items()}
    assert learnt.keys() == deltas.keys()
    shapes = {name: tuple(delta.shape) for name, delta in deltas.items()}
    assert sorted(sorted(g.names) for g in found) == sorted(map(sorted, oracle.groups(shapes)))
    for group, result in found.items():
        targets = [deltas[name] for name in group.names]
        total = sum(M.double().square().sum() for M in targets)
        rest = sum((deltas[name] - learnt[name]).square().sum() for name in group.names)
        assert result.errors[-1] == pytest.approx((rest / total).item(), abs=1e-6)
        assert result.lora_error == pytest.approx(tail(targets, 4).item(), abs=1e-10)
        assert result.errors[-1] <= result.lora_error + 1e-12


@pytest.mark.parametrize("entry", [LLAMA, GPT2], ids=ids)
def test_an_exact_fit_makes_the_changed_model(entry):
    """At the rank of the changes, the patched model's outputs equal the changed model's."""
    base, changed = entry.build(), entry.build()
    deltas = changes(base, entry.targets(base))
    with torch.no_grad():
        for name, delta in deltas.items():
            module = changed.get_submodule(name)
            module.weight.add_(delta.T if oracle.is_transposed(module) else delta)
    inputs = entry.inputs(0)
    solver.fit_adapter(base, deltas, 24, 2, iterations=0)
    assert all(p.requires_grad for p in rasa_ext.adapter_parameters(base))
    with torch.no_grad():
        ours, theirs, before = (entry.loss(m, inputs)[0] for m in (base, changed, entry.build()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"],
        ["lm_head"],
        ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"],
    ],
)
def test_just_the_named_layers_are_adapted(names, tmp_path):
    base = LLAMA.build()
    deltas = changes(base, names)
    solver.fit_adapter(base, deltas, 3, 1, iterations=2)
    assert set(adapters(base)) == set(names)
    rasa_ext.save_adapter(base, tmp_path)
    again = rasa_ext.load_adapter(LLAMA.build(), tmp_path)
    for name, adapter in adapters(again).items():
        torch.testing.assert_close(oracle.delta(adapter), oracle.delta(adapters(base)[name]))


def test_names_that_no_suffixes_tell_apart():
    """The name "0" is also a suffix of "1.0"."""
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4))
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), inner)
    solver.fit_adapter(base, {"0": torch.randn(4, 4)}, 2, 1)
    assert set(adapters(base)) == {"0"}


def test_ranks_that_are_not_needed_can_be_trained():
    base = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Linear(8, 9))
    pairs = {"0": (torch.randn(8, 1), torch.randn(1, 9)), "1": torch.randn(9, 8)}
    solver.fit_adapter(base, pairs, 4, 1)
    x = torch.randn(5, 9)
    base(x).square().sum().backward()
    assert base[0].B.grad.abs().amax(0).min() > 0


def test_progress_names_the_group():
    base, seen = LLAMA.build(), []
    deltas = changes(base, ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"])
    solver.fit_adapter(base, deltas, 2, 1, iterations=2, progress=lambda *now: seen.append(now))
    patterns = ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]
    assert [(group.pattern, done, total) for group, done, total in seen] == [
        (pattern, done, 2) for pattern in patterns for done in (1, 2)
    ]


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("deltas", "options", "error", "message"),
    [
        ([torch.ones(24, 24)], {}, TypeError, "deltas: expected a mapping"),
        ({}, {}, ValueError, "deltas: expected at least one"),
        ({"nowhere": torch.ones(24, 24)}, {}, ValueError, "'nowhere' is not in the model"),
        ({"model.norm": torch.ones(24, 24)}, {}, ValueError, "'model.norm' is a LlamaRMSNorm"),
        ({Q: torch.ones(24, 23)}, {}, ValueError, r"\(24, 24\) .* got \(24, 23\)"),
        ({Q: torch.full((24, 24), float("inf"))}, {}, ValueError, "finite"),
        ({Q: torch.ones(24, 24)}, {"rank": 0}, ValueError, "rank: expected"),
        ({Q: torch.ones(24, 24)}, {"init": "no"}, ValueError, "init: expected"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(deltas, options, error, message):
    base = LLAMA.build()
    before = Snapshot(base)
    with pytest.raises(error, match=message):
        solver.fit_adapter(base, deltas, **options)
    before.assert_unchanged()


def test_a_patched_model_is_refused():
    model = rasa_ext.patch_model(LLAMA.build())
    with pytest.raises(ValueError, match="already"):
        solver.fit_adapter(model, {Q: torch.ones(24, 24)})


def test_solvers_take_groups():
    base = Unet()
    finetuned = {name: t + torch.randn_like(t) for name, t in base.state_dict().items()}
    found = solver.compress(base, base.state_dict(), finetuned, 2, 1, groups=ENDS, iterations=2)
    assert {frozenset(group.names) for group in found.groups} == groups_by(by_end)
    names = [name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)]
    deltas = {name: torch.randn_like(base.get_submodule(name).weight) for name in names}
    fitted = solver.fit_adapter(base, deltas, 2, 1, groups=by_end, iterations=2)
    assert {frozenset(group.names) for group in fitted} == groups_by(by_end) == pool_members(base)
