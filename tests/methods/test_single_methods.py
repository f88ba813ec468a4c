"""What one method alone promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import methods, training
from tests.helpers.methods import base, inputs, randomize, rasa_linears

EXACT = {"rtol": 1e-10, "atol": 1e-12}
WIDE = {"adapter_dtype": torch.float64}


class Blocks(nn.Module):
    """n blocks B_i over one A, each a parameter of its own."""

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
    ours = optimizer(training.parameter_groups(model, lr=1e-2, weight_decay=decay))
    theirs = optimizer(plain.parameters(), lr=1e-2, weight_decay=decay)
    for _ in range(60):
        for module, its in ((model, ours), (plain, theirs)):
            (module(x) - y).square().mean().backward()
            its.step()
            its.zero_grad()
    torch.testing.assert_close(model[0].A, plain.A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[0].B, sum(plain.B), rtol=1e-10, atol=1e-12)


def saved_bytes(model, x) -> int:
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    weight = model[0].base_layer.weight
    kept.pop(weight.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "config",
    [methods.LoraConfig(4, train_A=False), methods.SboraConfig(4, side="A")],
    ids=["lora-fa", "sbora-fa"],
)
def test_a_frozen_A_keeps_no_x(config):
    x = torch.randn(4096, 64)
    sizes = {}
    for name, its in (("lora", methods.LoraConfig(4)), ("frozen", config)):
        model = rasa_ext.patch_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config=its)
        sizes[name] = saved_bytes(model, x)
    A = 4 * 64 * 4  # a buffer, and counted; a Parameter is not
    assert sizes["lora"] - sizes["frozen"] >= x.nbytes - A
    assert sizes["frozen"] < x.nbytes / 8  # U, and what is of the weights' size


def test_sbora_reads_features_exactly():
    config = methods.SboraConfig(4, 8.0, side="A", **WIDE)
    model = rasa_ext.patch_model(nn.Sequential(nn.Linear(7, 5, bias=False)).double(), config=config)
    randomize(model, 1)
    layer, x = model[0], torch.randn(6, 7, dtype=torch.float64)
    index = layer.own_tensors()["index"]
    change = model(x) - x @ layer.base_layer.weight.t()
    torch.testing.assert_close(change, 2 * x[:, index] @ layer.B.t(), **EXACT)
    rasa_ext.merge(model)
    columns = rasa_ext.delta_weight(layer).abs().sum(0).nonzero().flatten()
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
    """Equal to RaSA with k = r, whose frozen d is s within the window and zero elsewhere."""
    config = methods.ResLoraConfig(rank=2, alpha=3.0, window=1, **WIDE)
    model = rasa_ext.patch_model(base(), config=config)
    randomize(model, 1)
    band = rasa_ext.patch_model(base(), config=methods.RasaConfig(2, 2, **WIDE))
    with torch.no_grad():
        for name, layer in rasa_linears(band).items():
            pool, i = rasa_linears(model)[name].pool_tensors(), layer.place.index
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
        if layer.place.index == 0:
            pool = rasa_linears(model)[name].pool_tensors()
            grads = torch.cat([pool[f"A{j}"].grad for j in range(3)])
            torch.testing.assert_close(layer.pool.A.grad, grads, **EXACT)
            grads = torch.cat([pool[f"B{j}"].grad for j in range(3)], 1)
            torch.testing.assert_close(layer.pool.B.grad, grads, **EXACT)


@pytest.mark.parametrize("kind", [methods.RasaConfig, methods.SoraConfig])
def test_a_rank_pattern_of_no_layer_is_refused(kind):
    model = base()
    config = kind(4, rank_pattern={"up_proj": 8, "q_proj": 2}, target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"rank_pattern: .*'q_proj' matches none of 3"):
        rasa_ext.patch_model(model, config=config)
    assert not rasa_linears(model)


def test_ranks_by_pattern():
    config = methods.RasaConfig(4, 1, rank_pattern={r"0\.up_proj": 8, "down_proj": 2})
    model = rasa_ext.patch_model(base(), config=config)
    found = {name: layer.A.shape[0] for name, layer in rasa_linears(model).items()}
    assert found == {
        f"{i}.{name}": 1 if name == "down_proj" else 7 if i == 0 else 3
        for i in range(3)
        for name in ("up_proj", "down_proj")
    }
    assert {layer.effective_rank - layer.A.shape[0] for layer in rasa_linears(model).values()} == {
        3
    }
    assert "6-10" in str(rasa_ext.summary(model))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: methods.LoraConfig(0), "rank"),
        (lambda: methods.LoraConfig(alpha=0), "alpha"),
        (lambda: methods.LoraConfig(r=4), "did you mean rank"),
        (lambda: methods.BlockLoraConfig(8, blocks=3), "blocks"),
        (
            lambda: training.parameter_groups(rasa_ext.patch_model(base(), 4, 1), 1.0, gate_lr=1.0),
            "gate_lr: expected None",
        ),
        (lambda: methods.BlockLoraConfig(8, blocks=0), "blocks"),
        (lambda: methods.LoraConfig(train_A="no"), "train_A: expected True or False, got 'no'"),
        (lambda: methods.LoraConfig(rslora=1), "rslora: expected True or False, got 1"),
        (lambda: methods.SdLoraConfig(tied="x"), "tied: expected True or False"),
        (lambda: methods.BoostedPoolConfig(train_past=None), "train_past: expected True or False"),
        (lambda: methods.LoraConfig(stack=5), "stack: expected a mapping"),
        (lambda: methods.BoostedPoolConfig(stack={"0": "x"}), "stack: expected an integer"),
        (lambda: methods.SdLoraConfig(rank_schedule=[3]), "rank_schedule: expected a mapping"),
        (lambda: methods.SdLoraConfig(rank_schedule={"x": 3}), "rank_schedule: expected tasks"),
        (lambda: methods.SboraConfig(side="C"), "side"),
        (lambda: methods.SboraConfig(indices="best"), "indices"),
        (lambda: methods.SboraConfig(side="B", indices="activation"), "indices"),
        (lambda: rasa_ext.patch_model(base(), config=methods.SboraConfig(8)), "rank"),
        (lambda: methods.SoraConfig(4, k=5), "k"),
        (lambda: methods.ResLoraConfig(window=-1), "window"),
        (lambda: methods.ResLoraConfig(shortcut="ms"), "shortcut.*merged exactly"),
        (lambda: methods.ResLoraConfig(shortcut="xs"), "shortcut"),
        (lambda: methods.read_method({"peft_type": "RASA", "rasa_method": "elora"}), "rasa_method"),
        (lambda: methods.LoraConfig.from_dict({"peft_type": "RASA"}), "rasa_method"),
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
