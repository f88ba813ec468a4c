"""Properties that only one method has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext.methods import AdapterConfig, RasaConfig
from rasa_ext.training import parameter_groups
from rasa_research import methods, training
from tests.helpers.methods import base, inputs, randomize, rasa_linears
from tests.methods.test_single_methods import test_a_frozen_A_keeps_no_x  # noqa: F401 - run here

EXACT = {"rtol": 1e-10, "atol": 1e-12}
WIDE = {"adapter_dtype": torch.float64}


@pytest.fixture
def frozen() -> AdapterConfig:
    return methods.SboraConfig(4, side="A")


class Blocks(nn.Module):
    """n blocks B_i over one A, each a separate parameter."""

    def __init__(self, layer: rasa_ext.RasaLinear, n: int, scale: float) -> None:
        super().__init__()
        self.W, self.bias, self.scale = layer.base_layer.weight, layer.base_layer.bias, scale
        self.A = nn.Parameter(layer.A.detach().clone())
        self.B = nn.ParameterList(torch.zeros_like(layer.B) for _ in range(n))

    def forward(self, x):
        inner = x @ self.A.t()
        return x @ self.W.t() + self.bias + self.scale * sum(inner @ B.t() for B in self.B)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_block_lora_is_its_separate_blocks(optimizer, decay):
    torch.manual_seed(0)
    config = methods.BlockLoraConfig(rank=6, alpha=12.0, blocks=3, **WIDE)
    model = rasa_ext.patch_model(nn.Sequential(nn.Linear(7, 5)).double(), config=config)
    plain = Blocks(model[0], 3, 2.0)
    x, y = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    ours = optimizer(parameter_groups(model, lr=1e-2, weight_decay=decay))
    theirs = optimizer(plain.parameters(), lr=1e-2, weight_decay=decay)
    for _ in range(60):
        for module, its in ((model, ours), (plain, theirs)):
            (module(x) - y).square().mean().backward()
            its.step()
            its.zero_grad()
    torch.testing.assert_close(model[0].A, plain.A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[0].B, sum(plain.B), rtol=1e-10, atol=1e-12)


def test_sbora_reads_features_exactly():
    config = methods.SboraConfig(4, 8.0, side="A", **WIDE)
    model = rasa_ext.patch_model(nn.Sequential(nn.Linear(7, 5, bias=False)).double(), config=config)
    randomize(model, 1)
    layer, x = model[0], torch.randn(6, 7, dtype=torch.float64)
    index = layer.own_tensors()["index"]
    change = model(x) - x @ layer.base_layer.weight.t()
    torch.testing.assert_close(change, 2 * x[:, index] @ layer.B.t(), **EXACT)
    rasa_ext.merge(model)
    ((_, dW),) = rasa_ext.delta_weights(model)
    columns = dW.abs().sum(0).nonzero().flatten()
    assert columns.tolist() == sorted(index.tolist())


def test_sbora_writes_features_exactly():
    config = methods.SboraConfig(3, 3.0, side="B", **WIDE)
    model = rasa_ext.patch_model(nn.Sequential(nn.Linear(7, 5, bias=False)).double(), config=config)
    randomize(model, 1)
    layer, x = model[0], torch.randn(6, 7, dtype=torch.float64)
    index = layer.own_tensors()["index"]
    change = model(x) - x @ layer.base_layer.weight.t()
    expected = torch.zeros(6, 5, dtype=torch.float64)
    expected[:, index] = x @ layer.A.detach().t()
    torch.testing.assert_close(change.detach(), expected, **EXACT)


def test_sboras_choice():
    first, second = (
        rasa_ext.patch_model(base(), config=methods.SboraConfig(4, seed=seed)) for seed in (0, 1)
    )
    again = rasa_ext.patch_model(base(), config=methods.SboraConfig(4, seed=0))

    def chosen(model):
        return [layer.own_tensors()["index"].tolist() for layer in rasa_linears(model).values()]

    assert chosen(first) == chosen(again) != chosen(second)
    assert len({tuple(each) for each in chosen(first)}) > 1
    assert all(len(set(each)) == 4 for each in chosen(first))


def test_calibrated_it_reads_the_largest_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 4))
    config = methods.SboraConfig(3, indices="activation")
    rasa_ext.patch_model(model, config=config)
    batches = [torch.randn(5, 9) * torch.arange(9) for _ in range(3)]
    before = model(batches[0])
    hidden = torch.cat([model[0](batch) for batch in batches]).abs().mean(0)
    training.calibrate(model, batches)
    assert model[0].own_tensors()["index"].tolist() == [6, 7, 8]
    assert model[1].own_tensors()["index"].tolist() == sorted(hidden.topk(3).indices.tolist())
    assert torch.equal(model(batches[0]), before)
    assert not model[0]._forward_pre_hooks
    randomize(model, 1)
    with pytest.raises(ValueError, match="untrained"):
        training.calibrate(model, batches)


@pytest.mark.parametrize(
    "make",
    [
        lambda: training.calibrate(rasa_ext.patch_model(base(), 4, 1), []),
        lambda: training.calibrate(
            rasa_ext.patch_model(base(), config=methods.SboraConfig(2, indices="activation")), []
        ),
    ],
)
def test_what_calibrate_refuses(make):
    with pytest.raises(ValueError, match=r"model|batches"):
        make()


def test_reslora_is_rasa_with_a_band():
    """ResLoRA equals RaSA with k = r and a frozen d: s within the window, zero elsewhere."""
    config = methods.ResLoraConfig(rank=2, alpha=3.0, window=1, **WIDE)
    model = rasa_ext.patch_model(base(), config=config)
    randomize(model, 1)
    band = rasa_ext.patch_model(base(), config=RasaConfig(2, 2, **WIDE))
    with torch.no_grad():
        for name, layer in rasa_linears(band).items():
            pool, i = rasa_linears(model)[name].pool_tensors(), layer.spec.index
            if i == 0:
                layer.pool.A.copy_(torch.cat([pool[f"A{j}"] for j in range(3)]))
                layer.pool.B.copy_(torch.cat([pool[f"B{j}"] for j in range(3)], 1))
            layer.d.zero_()
            layer.d[2 * max(i - 1, 0) : 2 * i + 2] = 1.5
    x = inputs()
    torch.testing.assert_close(model(x), band(x), **EXACT)
    for each in (model, band):
        each(x).square().sum().backward()
    for name, layer in rasa_linears(band).items():
        if layer.spec.index == 0:
            pool = rasa_linears(model)[name].pool_tensors()
            grads = torch.cat([pool[f"A{j}"].grad for j in range(3)])
            torch.testing.assert_close(layer.pool.A.grad, grads, **EXACT)
            grads = torch.cat([pool[f"B{j}"].grad for j in range(3)], 1)
            torch.testing.assert_close(layer.pool.B.grad, grads, **EXACT)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: methods.BlockLoraConfig(8, blocks=3), "blocks"),
        (lambda: methods.BlockLoraConfig(8, blocks=0), "blocks"),
        (lambda: methods.SdLoraConfig(tied="x"), "tied: expected True or False"),
        (lambda: methods.BoostedPoolConfig(train_past=None), "train_past: expected True or False"),
        (lambda: methods.BoostedLoraConfig(stack=5), "stack: expected a mapping"),
        (lambda: methods.BoostedPoolConfig(stack={"0": "x"}), "stack: expected an integer"),
        (lambda: methods.SdLoraConfig(rank_schedule=[3]), "rank_schedule: expected a mapping"),
        (lambda: methods.SdLoraConfig(rank_schedule={"x": 3}), "rank_schedule: expected tasks"),
        (lambda: methods.BoostedLoraConfig(stack={"a": -1}), r"^stack: .*-1"),
        (lambda: methods.SdLoraConfig(past="x"), r"^past: .*got 'x'"),
        (lambda: methods.SdLoraConfig(past=(2.5,)), r"^past: .*got 2.5"),
        (lambda: methods.SdLoraConfig(past=(2, 0)), r"^past: .*got \(2, 0\)"),
        (lambda: methods.SboraConfig(seed=-1), r"^seed: .*got -1"),
        (lambda: methods.SboraConfig(seed=1 << 62), "^seed: "),
        (lambda: methods.SboraConfig(side="C"), "side"),
        (lambda: methods.SboraConfig(indices="best"), "indices"),
        (lambda: methods.SboraConfig(side="B", indices="activation"), "indices"),
        (lambda: rasa_ext.patch_model(base(), config=methods.SboraConfig(8)), "rank"),
        (lambda: methods.ResLoraConfig(window=-1), "window"),
        (lambda: methods.ResLoraConfig(shortcut="ms"), "shortcut.*merged exactly"),
        (lambda: methods.ResLoraConfig(shortcut="xs"), "shortcut"),
    ],
)
def test_bad_input(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def test_a_refused_rank_leaves_the_model_as_it_was():
    model = base()
    with pytest.raises(ValueError, match="rank"):
        rasa_ext.patch_model(model, config=methods.SboraConfig(8))
    assert not any(isinstance(m, rasa_ext.RasaLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
