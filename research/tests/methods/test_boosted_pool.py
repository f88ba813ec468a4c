"""Boosters as slots of a pool, against a naive model that adds every booster separately."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rasa_ext
from rasa_research import training
from rasa_research.methods import BoostedPoolConfig
from tests.helpers.methods import base, inputs, rasa_linears

EXACT = {"rtol": 1e-10, "atol": 1e-11}
GROUPS = ("up_proj", "down_proj")
LAYERS = [f"{i}.{group}" for i in range(3) for group in GROUPS]


def patched(**options) -> nn.Module:
    config = BoostedPoolConfig(adapter_dtype=torch.float64, **options)
    return rasa_ext.patch_model(base(), config=config)


class Naive:
    """W_i + sum over boosters of B_t diag(d_it) A_t, with a list of boosters per group."""

    def __init__(self, rank: int, alpha: float) -> None:
        self.start = alpha / rank
        weights = base()
        self.W = {name: weights.get_submodule(name).weight.detach() for name in LAYERS}
        self.bias = {name: weights.get_submodule(name).bias for name in LAYERS}
        self.boosters: dict[str, list[tuple[Tensor, Tensor, dict[str, Tensor]]]] = {
            group: [] for group in GROUPS
        }

    def begin(self, group: str, A: Tensor, out: int, drawn) -> None:
        d = {
            name: torch.full((len(A),), self.start if name in drawn else 0.0, dtype=torch.float64)
            for name in LAYERS
            if name.endswith(group)
        }
        B = torch.zeros(out, len(A), dtype=torch.float64)
        self.boosters[group].append((A.detach().clone(), B, d))

    def trained(self, drawn, past: bool) -> list[Tensor]:
        """Return the newest pairs of groups with a drawn layer, and the drawn layers' entries."""
        found = []
        for group, boosters in self.boosters.items():
            names = [name for name in drawn if name.endswith(group)]
            if names:
                found += boosters[-1][:2]
            for _, _, d in boosters if past else boosters[-1:]:
                found += [d[name] for name in names]
        return [tensor.requires_grad_() for tensor in found]

    def delta(self, name: str) -> Tensor:
        boosters = self.boosters[name.partition(".")[2]]
        return sum(B @ torch.diag(d[name]) @ A for A, B, d in boosters)

    def __call__(self, x: Tensor) -> Tensor:
        for i in range(3):
            W = {group: self.W[f"{i}.{group}"] + self.delta(f"{i}.{group}") for group in GROUPS}
            hidden = torch.tanh(x @ W["up_proj"].t() + self.bias[f"{i}.up_proj"])
            x = x + hidden @ W["down_proj"].t()
        return x


def loss_of(model, x) -> Tensor:
    return (model(x) - x.roll(1, 0)).square().mean()


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def pools(model) -> dict[str, rasa_ext.nn.RasaPool]:
    return {group: rasa_linears(model)[f"0.{group}"].pool for group in GROUPS}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("layers", [None, 2])
def test_several_boosters_are_the_naive_model_s(layers, past, rank, tmp_path, figure):
    """Five boosters equal a naive model with an optimizer per booster, and so do all exports."""
    x, model = inputs(20), patched(rank=rank, alpha=1.5, train_past=past)
    naive = Naive(rank, 1.5)
    optimizer = adam(rasa_ext.adapter_parameters(model))
    boosting = training.Boosting(model, optimizer, steps=4, layers=layers, seed=2)
    apart = 0.0
    before: tuple[str, ...] = ()
    for number in range(5):
        drawn = boosting.drawn
        for group, pool in pools(model).items():
            if number == 0 or any(name.endswith(group) for name in before):
                naive.begin(group, pool.A, len(pool.B), drawn)
            else:  # no layer trained the newest pair; it starts again with these layers
                A, B, _ = naive.boosters[group].pop()
                naive.begin(group, A, len(B), drawn)
        fresh = adam(naive.trained(drawn, past))
        for step in range(4):
            losses = [loss_of(each, x) for each in (model, naive)]
            apart = max(apart, abs(losses[0] - losses[1]).item())
            for loss in losses:
                loss.backward()
            optimizer.step()
            fresh.step()
            optimizer.zero_grad()
            fresh.zero_grad()
            assert boosting.step() == (step == 3)
        for boosters in naive.boosters.values():
            for A, B, d in boosters:
                for tensor in (A, B, *d.values()):
                    tensor.requires_grad_(False)
        before = drawn
    figure(f"boosted pool: 20 steps' losses differ from a naive model's by {apart:.1e}")
    assert apart < 1e-10
    expected = naive(x)
    torch.testing.assert_close(model(x), expected, **EXACT)

    rasa_ext.save_adapter(model, tmp_path / "own")
    again = rasa_ext.load_adapter(base(), tmp_path / "own")
    torch.testing.assert_close(again(x), expected, **EXACT)
    rank = rasa_ext.export_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == rank
    for name in LAYERS:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(B.double() @ A.double(), naive.delta(name), rtol=1e-5, atol=1e-6)
    rasa_ext.merge(model.eval())
    torch.testing.assert_close(model(x), expected, **EXACT)
    rasa_ext.unmerge(model)
    torch.testing.assert_close(rasa_ext.merge_and_unload(model)(x), expected, **EXACT)


def test_what_a_booster_costs():
    """A booster trains in + out + L parameters per group, not L (in + out)."""
    rows = rasa_ext.summary(patched())
    assert {row.trainable for row in rows} == {7 + 9 + 3}


def test_what_is_not_drawn_stays():
    x, model = inputs(20), patched(train_past=True)
    optimizer = adam(rasa_ext.adapter_parameters(model))
    boosting = training.Boosting(model, optimizer, steps=2, layers=1, seed=1)
    for _ in range(6):
        deltas, drawn = dict(rasa_ext.delta_weights(model)), boosting.drawn
        for _ in range(2):
            loss_of(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            pushed = boosting.step()
        assert pushed
        for name, dW in rasa_ext.delta_weights(model):
            assert torch.equal(dW, deltas[name]) == (name not in drawn)
    sizes = {group: len(pool.stack_A) for group, pool in pools(model).items()}
    assert sum(sizes.values()) == 6  # one pair per booster, in the drawn group
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in rasa_ext.adapter_parameters(model)}


def test_a_shrunk_booster_counts_as_much():
    model = patched()
    boosting = training.Boosting(model, adam(rasa_ext.adapter_parameters(model)), 1, alpha=0.25)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.normal_()
    deltas = dict(rasa_ext.delta_weights(model))
    boosting.step()
    for name, dW in rasa_ext.delta_weights(model):
        torch.testing.assert_close(dW, 0.25 * deltas[name])


def test_the_penalty():
    model = patched()
    boosting = training.Boosting(model, adam(rasa_ext.adapter_parameters(model)), 2, layers=1)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.normal_()
    (live,) = [pool for group, pool in pools(model).items() if boosting.drawn[0].endswith(group)]
    torch.testing.assert_close(boosting.penalty(), (live.A**2).sum() + (live.B**2).sum(), **EXACT)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("stop", [6, 7])  # at the start and in the middle of a booster
def test_resumed(stop, past, tmp_path):
    x = inputs(20)

    def begin(model, seed):
        optimizer = adam(rasa_ext.adapter_parameters(model))
        return model, optimizer, training.Boosting(model, optimizer, 3, layers=2, seed=seed)

    def train(model, optimizer, boosting, steps):
        for _ in range(steps):
            loss_of(model, x).backward()
            optimizer.step()
            boosting.step()
            optimizer.zero_grad()

    whole = begin(patched(train_past=past), 4)
    train(*whole, stop)
    rasa_ext.save_adapter(whole[0], tmp_path)
    torch.save([each.state_dict() for each in whole[1:]], tmp_path / "state.pt")
    torch.manual_seed(1)
    train(*whole, 6)

    again = begin(rasa_ext.load_adapter(base(), tmp_path), 0)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for each, state in zip(again[1:], states, strict=True):
        each.load_state_dict(state)
    torch.manual_seed(1)
    train(*again, 6)
    assert torch.equal(again[0](x), whole[0](x))
