"""Boosters on a stack: equal to merging each into the base, without writing to the base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_research import methods, training
from tests.helpers.adapter_folders import check_large_field
from tests.helpers.methods import base, inputs, randomize, rasa_linears

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def patched(model=None, dtype=torch.float64, **options) -> nn.Module:
    config = methods.BoostedLoraConfig(adapter_dtype=dtype, **options)
    return rasa_ext.patch_model(base() if model is None else model, config=config)


def loss_of(model, x) -> torch.Tensor:
    return (model(x) - x.roll(1, 0)).square().mean()


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=1e-2)


def test_a_stack_is_sequential_merges():
    """Losses equal those of merging at every step, over four boosters with fresh optimizers."""
    x, model, merged = inputs(20), patched(), patched()
    optimizer = adam(model)
    boosting = training.Boosting(model, optimizer, steps=3)
    for _ in range(4):
        for name, layer in rasa_linears(merged).items():
            mine = rasa_linears(model)[name]
            with torch.no_grad():
                layer.A.copy_(mine.A)
                layer.B.copy_(mine.B)
        fresh = adam(merged)
        for step in range(3):
            losses = [loss_of(each, x) for each in (model, merged)]
            torch.testing.assert_close(*losses, **EXACT)
            for loss in losses:
                loss.backward()
            optimizer.step()
            fresh.step()
            optimizer.zero_grad()
            fresh.zero_grad()
            assert boosting.step() == (step == 2)
        merged = patched(rasa_ext.merge_and_unload(merged))
    torch.testing.assert_close(model(x), merged(x), **EXACT)
    assert {layer.effective_rank for layer in rasa_linears(model).values()} == {5}


def test_in_bfloat16_a_stack_is_nearer_than_merges():
    """A stack never writes to the base, so rounding errors do not add up."""
    exact = patched()
    stacked, merged = (patched(base().bfloat16(), torch.float32) for _ in range(2))
    x = inputs().bfloat16()
    boosting = training.Boosting(stacked, adam(stacked), steps=1)
    for seed in range(12):
        for each in (stacked, merged):
            randomize(each, seed)
            for parameter in rasa_ext.adapter_parameters(each):
                parameter.data.mul_(0.15)
        with torch.no_grad():
            for name, layer in rasa_linears(exact).items():
                its = rasa_linears(merged)[name]
                layer.base_layer.weight += (its.B @ its.A).double()
        boosting.step()
        merged = patched(rasa_ext.merge_and_unload(merged), torch.float32)
    first = base().bfloat16().double()
    with torch.no_grad():
        for name, layer in rasa_linears(exact).items():  # the exact sum over the rounded base
            layer.base_layer.weight += (
                first.get_submodule(name).weight - base().get_submodule(name).weight
            )
        expected = {n: layer.base_layer.weight for n, layer in rasa_linears(exact).items()}
        errors, changes = {"stack": 0.0, "merges": 0.0}, dict(rasa_ext.delta_weights(stacked))
        for name, layer in rasa_linears(stacked).items():
            weight = layer.base_layer.weight.double() + changes[name].double()
            errors["stack"] += (weight - expected[name]).square().sum().item()
            weight = rasa_linears(merged)[name].base_layer.weight.double()
            errors["merges"] += (weight - expected[name]).square().sum().item()
    assert errors["stack"] < 1e-6 * errors["merges"]
    assert stacked(x).isfinite().all()


def test_layers_that_are_not_drawn_stay():
    model, x = patched(), inputs(20)
    optimizer = adam(model)
    boosting = training.Boosting(model, optimizer, steps=1, layers=2, seed=1)
    seen = set()
    for _ in range(5):
        drawn, before = boosting.drawn, copy.deepcopy(model.state_dict())
        assert len(drawn) == 2
        loss_of(model, x).backward()
        optimizer.step()
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert changed <= {f"{name}.{field}" for name in drawn for field in "AB"}
        assert changed >= {f"{name}.B" for name in drawn}
        boosting.step()
        optimizer.zero_grad()
        seen |= set(drawn)
    assert len(seen) > 2
    sizes = [len(layer.own_tensors().get("stack_A", ())) for layer in rasa_linears(model).values()]
    assert sum(sizes) == 10


def test_a_booster_begins_as_with_a_fresh_optimizer():
    """The step count is reset with the moments; otherwise the first step would be too large."""
    model, x = patched(), inputs(20)
    optimizer = adam(model)
    boosting = training.Boosting(model, optimizer, steps=4)
    for _ in range(4):
        loss_of(model, x).backward()
        optimizer.step()
        boosting.step()
        optimizer.zero_grad()
    other = copy.deepcopy(model)
    fresh = adam(other)
    for each, its in ((model, optimizer), (other, fresh)):
        loss_of(each, x).backward()
        its.step()
    for mine, theirs in zip(
        rasa_ext.adapter_parameters(model), rasa_ext.adapter_parameters(other), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_shrunk_booster_counts_as_much():
    model, x = patched(), inputs()
    boosting = training.Boosting(model, adam(model), steps=1, alpha=0.25)
    randomize(model, 2)
    deltas = dict(rasa_ext.delta_weights(model))
    boosting.step()
    for name, dW in rasa_ext.delta_weights(model):
        torch.testing.assert_close(dW, 0.25 * deltas[name])
    assert model(x).isfinite().all()


def test_resumed_in_the_middle_of_a_booster(tmp_path):
    x = inputs(20)

    def train(model, optimizer, boosting, steps):
        for _ in range(steps):
            loss_of(model, x).backward()
            optimizer.step()
            boosting.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    whole = patched()
    randomize(whole, 1)
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(whole), lr=0.1, momentum=0.9)
    boosting = training.Boosting(whole, optimizer, steps=3, layers=3, seed=4)
    train(whole, optimizer, boosting, 4)
    rasa_ext.save_adapter(whole, tmp_path)
    torch.save((boosting.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    torch.manual_seed(1)
    train(whole, optimizer, boosting, 4)

    again = rasa_ext.load_adapter(base(), tmp_path)
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(again), lr=0.1, momentum=0.9)
    boosting = training.Boosting(again, optimizer, steps=3, layers=3, seed=0)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    boosting.load_state_dict(states[0])
    other = patched()
    with pytest.raises(ValueError, match=r"with the 3 ranks .* got 0; .*load_adapter"):
        training.Boosting(other, adam(other), steps=3).load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    torch.manual_seed(1)
    train(again, optimizer, boosting, 4)
    assert torch.equal(again(x), whole(x))


def test_the_penalty():
    model = patched()
    boosting = training.Boosting(model, adam(model), steps=2, layers=2)
    randomize(model, 1)
    live = [layer for name, layer in rasa_linears(model).items() if name in boosting.drawn]
    expected = sum((layer.A**2).sum() + (layer.B**2).sum() for layer in live)
    torch.testing.assert_close(boosting.penalty(), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:a trained adapter was cast")
def test_a_cast_pair_has_its_dtype_again_once_it_is_drawn():
    """train() restores only what is trained then."""
    model = patched(base(dtype=torch.float32), torch.float32)
    boosting = training.Boosting(model, adam(model), steps=1, layers=2, seed=1)
    model.bfloat16().train()
    for _ in range(4):
        trained = [p for p in rasa_ext.adapter_parameters(model) if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        boosting.step()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": 1, "layers": 7}, "layers"),
        ({"steps": 1, "layers": 0}, "layers"),
        ({"steps": 1, "alpha": "one"}, "alpha"),
        ({"steps": 1, "seed": "x"}, "seed: expected an integer"),
        ({"steps": 1, "optimizer": None}, "optimizer: expected a torch.optim.Optimizer"),
        ({"steps": 1, "optimizer": adam(patched())}, "optimizer: expected one of"),
    ],
)
def test_bad_input(options, named):
    model = patched()
    options = {"optimizer": adam(model), **options}
    with pytest.raises((ValueError, TypeError), match=named):
        training.Boosting(model, **options)


def test_a_file_of_more_boosters_than_it_has(tmp_path):
    """The file is refused before a tensor of that size is allocated."""
    stack = {"model.layers.0.self_attn.q_proj": 10**8}
    check_large_field(methods.BoostedLoraConfig(), "rasa_stack", stack, tmp_path)


def test_other_methods_are_refused():
    for config in (rasa_ext.RasaConfig(), rasa_ext.methods.LoraConfig(1)):
        model = rasa_ext.patch_model(base(), config=config)
        with pytest.raises(ValueError, match="BoostedLoraConfig or BoostedPoolConfig, got"):
            training.Boosting(model, adam(model), steps=1)


def test_over_four_bits():
    """Over a 4-bit base rounding would hide a merge; the stack is exact."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4"))
    model[0].weight = bitsandbytes.nn.Params4bit(
        torch.randn(64, 64), requires_grad=False, quant_type="nf4"
    )
    model = model.to("cpu")
    x = torch.randn(4, 64)
    before = model(x)
    patched(model, torch.float32)
    boosting = training.Boosting(model, adam(model), steps=1)
    total = torch.zeros(64, 64)
    for seed in range(3):
        randomize(model, seed)
        total += (model[0].B @ model[0].A).detach()
        boosting.step()
    torch.testing.assert_close(model(x), before + x @ total.t(), rtol=1e-4, atol=1e-4)
