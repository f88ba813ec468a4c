"""Layers that read one input, computed together: equal to the oracle whatever users do."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.nn import functional
from rasa_ext.nn import fused_projections as siblings
from tests.helpers.adapters import (
    adapted_layers,
    adapters,
    assert_matches_oracle,
    check_step,
    observe,
    patched,
)
from tests.helpers.models import BERT, GPT2, LLAMA, T5, VIT, Entry, ids

# How many groups of siblings one forward of the model computes together, and of how many layers.
GROUPS = {
    "llama": [3, 2] * 3,
    "bert": [3] * 2,
    "t5": [3, 2] * 2 + [3, 2, 2] * 2,  # of the decoder's cross-attention k and v alone
    "vit": [3] * 2,
    "gpt2": [],
}
FAMILIES = [LLAMA, BERT, T5, VIT, GPT2]


class Log(list):
    """The sizes of the groups that were computed together, in order."""

    def take(self) -> list[int]:
        taken = list(self)
        self.clear()
        return taken


@pytest.fixture(autouse=True)
def _on(monkeypatch):
    monkeypatch.setattr(siblings, "ENABLED", True)


@pytest.fixture
def log(monkeypatch) -> Log:
    found = Log()
    with_grad, without = functional.adapted_projections, ops.linear_projections

    def training(x, weights, *args):
        found.append(len(weights))
        return with_grad(x, weights, *args)

    def quiet(x, weights, *args):
        if not torch.is_grad_enabled():
            found.append(len(weights))
        return without(x, weights, *args)

    monkeypatch.setattr(functional, "adapted_projections", training)
    monkeypatch.setattr(ops, "linear_projections", quiet)
    # Function.forward runs without grad as well: the operator must not be counted twice there.
    monkeypatch.setattr(functional, "ops", _Without(ops, linear_projections=without))
    return found


class _Without:
    def __init__(self, module, **others):
        self.__dict__.update({**vars(module), **others})


def touch(model: nn.Module) -> None:
    """What an optimiser's step looks like from outside, with no change."""
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.mul_(1)


def warmed(entry: Entry, model: nn.Module) -> nn.Module:
    """After one training step, which is when siblings know each other."""
    entry.loss(model, entry.inputs(9))[1].backward()
    touch(model)
    model.zero_grad()
    return model


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_training(entry, k, log):
    base = entry.build()
    model = patched(base, 4, k).train()
    check_step(entry, base, model)
    assert log.take() == []  # nothing is known yet
    touch(model)
    for seed in (1, 2):
        check_step(entry, base, model, seed=seed)
        assert sorted(log.take()) == sorted(GROUPS[entry.name])


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_without_grad(entry, log):
    model = patched(entry.build()).eval()
    inputs = entry.inputs(0)
    with torch.no_grad():
        alone = entry.loss(model, inputs)[0]
        log.clear()
        for _ in range(2):
            torch.testing.assert_close(entry.loss(model, inputs)[0], alone, rtol=1e-5, atol=1e-5)
            assert sorted(log.take()) == sorted(GROUPS[entry.name])
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.mul_(1.25)  # a cached pack must not survive it
        changed = entry.loss(model, inputs)[0]
        fresh = entry.loss(copy.deepcopy(model), inputs)[0]
    assert not torch.allclose(changed, alone)
    torch.testing.assert_close(changed, fresh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entry", [LLAMA, BERT, T5, VIT], ids=ids)
def test_checkpointing(entry, use_reentrant, log):
    base = entry.build()
    model = patched(base).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    warmed(entry, model)
    log.clear()
    for seed in (0, 1):
        check_step(entry, base, model, seed=seed)
        assert log.take()


def test_a_checkpoint_between_the_first_two_steps(log):
    """Learned in the forward, yet not used when that forward runs again."""
    base = LLAMA.build()
    model = patched(base).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(3):  # without an optimiser's step between them
        check_step(LLAMA, base, model, seed=seed)
    assert not log


def test_compile_goes_its_own_way(log):
    torch._dynamo.reset()
    base = LLAMA.build()
    model = warmed(LLAMA, patched(base).train())
    log.clear()
    check_step(LLAMA, base, model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert not log


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_learn_on_their_own(how, log):
    base = LLAMA.build()
    model = warmed(LLAMA, patched(base).train())
    log.clear()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    check_step(LLAMA, base, twin)
    assert not log
    touch(twin)
    check_step(LLAMA, base, twin)
    assert sorted(log.take()) == sorted(GROUPS["llama"])
    check_step(LLAMA, base, model)
    assert sorted(log.take()) == sorted(GROUPS["llama"])
    mine, theirs = (
        {id(layer.siblings) for layer in adapted_layers(m).values()} for m in (model, twin)
    )
    assert not mine & theirs - {id(None)}


class Pair(nn.Module):
    """Two layers that read what ``feed`` gives each of them."""

    def __init__(self, feed=lambda x: (x, x)):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 4, bias=False)
        self.feed = feed

    def forward(self, x):
        first, second = self.feed(x)
        return torch.cat([self.a(first), self.b(second)], -1)


def pair(**options) -> nn.Module:
    model = patched(nn.Sequential(Pair()), **options).train()
    model(torch.randn(3, 6)).sum().backward()
    touch(model)
    with torch.no_grad():
        model(torch.randn(3, 6))
    return model


def expected(model, first, second):
    """Every layer alone."""
    layers = copy.deepcopy(model)[0]
    return torch.cat([layers.a(first), layers.b(second)], -1)


@pytest.mark.parametrize("grad", [True, False])
def test_x_written_to_in_between(grad, log):
    model = pair()
    log.clear()
    x = torch.randn(3, 6)
    changing = x.clone()
    with torch.set_grad_enabled(grad):
        first = model[0].a(changing)
        changing.mul_(2)
        second = model[0].b(changing)
    assert log == [2]
    torch.testing.assert_close(torch.cat([first, second], -1), expected(model, x, 2 * x))


@pytest.mark.parametrize("parameter", ["A", "B", "d", "pool", "weight", "replaced"])
def test_a_parameter_written_to_in_between(parameter, log):
    model = pair()
    log.clear()
    a, b = model[0].a, model[0].b
    x = torch.randn(3, 6)
    with torch.no_grad():
        a(x)
        if parameter == "replaced":
            b.d = nn.Parameter(b.d * 2)
        elif parameter == "pool":
            b.pool.A.mul_(2)
        else:
            getattr(b, parameter).mul_(2)
        found = b(x)
        alone = copy.deepcopy(b)(x)
    assert log == [2]
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("what", ["disabled", "merged", "hook on the base", "trained base"])
def test_what_is_no_plain_layer_goes_alone(what, log):
    model = pair()
    b = model[0].b
    if what == "merged":
        rasa_ext.merge(model)
        model.eval()
    elif what == "disabled":
        b.disabled = True
    elif what == "hook on the base":
        b.base_layer.register_forward_hook(_one_more)
    else:
        b.base_layer.weight.requires_grad_(True)
    log.clear()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), expected(model, x, x))
    assert not log


def _one_more(module, args, y):
    return y + 1


def test_dropout_in_training_goes_alone(log):
    model = pair(dropout=0.5)
    log.clear()
    model(torch.randn(3, 6))
    assert not log
    with torch.no_grad():
        model.eval()
        for _ in range(2):
            model(torch.randn(3, 6))
    assert log


def test_the_same_x_twice(log):
    """A second forward over the same tensor is a new round."""
    model = pair()
    log.clear()
    x = torch.randn(3, 6)
    first, second = model(x), model(x)
    assert log == [2, 2]
    assert torch.equal(first, second)
    first.sum().backward()
    second.sum().backward()


def test_with_and_without_grad_do_not_mix():
    model = pair()
    a, b = model[0].a, model[0].b
    x = torch.randn(3, 6)
    a(x)
    with torch.no_grad():
        assert b(x).grad_fn is None
    with torch.no_grad():
        a(x)
    assert b(x).grad_fn is not None


def test_an_x_that_begins_to_require_grad():
    model = pair()
    a, b = model[0].a, model[0].b
    x = torch.randn(3, 6)
    a(x)
    x.requires_grad_()
    b(x).sum().backward()
    assert x.grad is not None


def test_outputs_that_nobody_fetches_are_let_go():
    model = pair()
    a = model[0].a
    with torch.no_grad():
        a(torch.randn(3, 6))
        waiting = [y for y, _ in a.siblings._modes[0].round.outputs.values()]
        assert len(waiting) == 1
        gone = weakref.ref(waiting.pop())
        a(torch.randn(3, 6))
        assert gone() is None
        model.train()
        assert a.siblings._modes[0].round is None


def test_a_habit_that_changes_is_learned_anew(log):
    model = pair()
    a, b = model[0].a, model[0].b
    with torch.no_grad():
        for _ in range(3):
            a(torch.randn(3, 6))
        log.clear()
        a(torch.randn(3, 6))
        assert not log  # b no longer comes
        for _ in range(3):
            x = torch.randn(3, 6)
            torch.testing.assert_close(b(x), copy.deepcopy(b)(x))
            torch.testing.assert_close(a(x), copy.deepcopy(a)(x))
    assert log  # and now the two come in the other order


def test_other_inputs_of_the_same_layers(log):
    """Layers of one parent that never read one x are left alone."""
    model = patched(nn.Sequential(Pair(lambda x: (x, x + 1)))).train()
    for _ in range(3):
        x = torch.randn(3, 6)
        torch.testing.assert_close(model(x), expected(model, x, x + 1))
        touch(model)
    assert not log


def test_nothing_is_kept_alive():
    model = pair()
    gone = weakref.ref(model[0].b)
    del model
    gc.collect(0)
    assert gone() is None


def test_a_layer_that_is_gone(log):
    model = pair()
    del model[0].b
    gc.collect()
    log.clear()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model[0].a(x), copy.deepcopy(model[0].a)(x))
    assert not log


def test_autocast(log):
    model = warmed(LLAMA, patched(LLAMA.build().to(torch.bfloat16)))
    log.clear()
    inputs = LLAMA.inputs(0)
    with torch.autocast("cpu", torch.bfloat16):
        together = observe(model, adapters(model), LLAMA, inputs)
        assert sorted(log) == sorted(GROUPS["llama"])
        siblings.ENABLED = False
        alone = observe(model, adapters(model), LLAMA, inputs)
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        assert together[key].dtype == value.dtype
        assert (together[key] - value).norm() <= 0.05 * value.norm() + 1e-6, key


def test_outputs_can_be_modified_in_place():
    model = pair()
    x = torch.randn(2, 3, 6)
    grads = []
    for in_place in (False, True):
        a, b = model[0].a(x), model[0].b(x)
        a, b = (a.mul_(2), b.relu_()) if in_place else (a * 2, b.relu())
        loss = a.square().sum() + b.square().sum()
        grads.append(torch.autograd.grad(loss, rasa_ext.adapter_parameters(model)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_unpatch_and_merge(log):
    base = LLAMA.build()
    model = warmed(LLAMA, patched(base))
    inputs = LLAMA.inputs(0)
    with torch.no_grad():
        adapted = LLAMA.loss(model, inputs)[0]
        rasa_ext.merge(model.eval())
        torch.testing.assert_close(LLAMA.loss(model, inputs)[0], adapted, rtol=1e-4, atol=1e-4)
        rasa_ext.unmerge(model)
        torch.testing.assert_close(LLAMA.loss(model, inputs)[0], adapted, rtol=1e-5, atol=1e-5)
    rasa_ext.unpatch(model)
    assert not adapted_layers(model)


@pytest.mark.parametrize("entry", [LLAMA, T5], ids=ids)
def test_switched_off(entry, log):
    siblings.ENABLED = False
    base = entry.build()
    check_step(entry, base, warmed(entry, patched(base)))
    assert not log


def test_gradient_accumulation_and_two_forwards(log):
    base = LLAMA.build()
    model = warmed(LLAMA, patched(base))
    log.clear()
    one, two = (observe(model, adapters(model), LLAMA, LLAMA.inputs(seed)) for seed in (0, 1))
    losses = [LLAMA.loss(model, LLAMA.inputs(seed))[1] for seed in (0, 1)]
    model.zero_grad()
    sum(losses).backward()
    for name, layer in adapted_layers(model).items():
        total = one[f"{name}.d"] + two[f"{name}.d"]
        torch.testing.assert_close(layer.d.grad, total, rtol=1e-4, atol=1e-5)
    assert sorted(log) == sorted(GROUPS["llama"] * 4)


def test_inference_mode_goes_alone(log):
    model = pair()
    log.clear()
    with torch.inference_mode():
        x = torch.randn(3, 6)
        found = model(x)
    assert not log
    with torch.no_grad():
        torch.testing.assert_close(found.clone(), expected(model, x.clone(), x.clone()))


def test_results_match_the_oracle_after_every_detour():
    """The same model in and out of evaluation, other inputs and accumulation."""
    base = LLAMA.build()
    model = warmed(LLAMA, patched(base))
    for seed in range(3):
        with torch.no_grad():
            LLAMA.loss(model.eval(), LLAMA.inputs(seed + 5))
        model.train()
        inputs = LLAMA.inputs(seed)
        observed = observe(model, adapters(model), LLAMA, inputs)
        assert_matches_oracle(LLAMA, base, model, observed, inputs)
        touch(model)
