"""Cases of every method of this package: the core's small model and the method's formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext import RasaLinear
from rasa_research import methods, training
from tests.helpers.methods import KNOWN, WIDE, Case, base, plain, randomize, rasa_linears


def _two_tasks(**options) -> nn.Module:
    config = methods.SdLoraConfig(rank=3, adapter_dtype=torch.float64, **options)
    model = rasa_ext.patch_model(base(), config=config)
    for seed in (1, 2):
        randomize(model, seed)
        training.next_task(model)
    return model


def _boosted(config: rasa_ext.methods.AdapterConfig) -> nn.Module:
    model = rasa_ext.patch_model(base(), config=config)
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
    boosting = training.Boosting(model, optimizer, steps=1, layers=4, seed=5)
    for seed in range(3):
        randomize(model, seed)
        boosting.step()
    return model


def _boosted_lora(layer: RasaLinear) -> Tensor:
    t = layer.own_tensors()
    return t["B"] @ t["A"] + (t["stack_B"] @ t["stack_A"] if "stack_A" in t else 0)


def _boosted_pool(layer: RasaLinear) -> Tensor:
    t, pool = layer.own_tensors(), layer.pool_tensors()
    dW = (pool["B"] * t["d"]) @ pool["A"]
    for entry, a, b in zip(t["stack_d"], pool["stack_A"], pool["stack_B"].t(), strict=True):
        dW = dW + entry * torch.outer(b, a)
    return dW


def _block_lora(layer: RasaLinear) -> Tensor:
    return layer.config.alpha / layer.config.rank * layer.B @ layer.A


def _sbora(layer: RasaLinear) -> Tensor:
    t, reads = layer.own_tensors(), layer.config.side == "A"
    dW = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for column, feature in enumerate(t["index"].tolist()):
        if reads:
            unit = torch.eye(layer.in_features, dtype=torch.float64)[feature]
            dW = dW + torch.outer(t["B"][:, column], unit)
        else:
            unit = torch.eye(layer.out_features, dtype=torch.float64)[feature]
            dW = dW + torch.outer(unit, t["A"][column])
    return dW * (layer.config.alpha / layer.config.rank)


def _reslora(layer: RasaLinear) -> Tensor:
    config, pool, index = layer.config, layer.pool_tensors(), layer.spec.index
    terms = range(max(0, index - config.window), index + 1)
    return sum(pool[f"B{i}"] @ pool[f"A{i}"] for i in terms) * (config.alpha / config.rank)


def _sd_lora(layer: RasaLinear) -> Tensor:
    config, t = layer.config, layer.own_tensors()
    m = (layer.pool_tensors() if config.tied else t)["m"]
    dW = m[-1] * t["B"] @ t["A"]
    if config.norm == "frobenius":
        dW = dW / (t["B"] @ t["A"]).norm()
    begin = 0
    for task, rank in enumerate(config.past):
        A, B = t["stack_A"][begin : begin + rank], t["stack_B"][:, begin : begin + rank]
        sizes = {"none": 1.0, "frobenius": (B @ A).norm(), "product": B.norm() * A.norm()}
        dW = dW + m[task] * (B @ A) / sizes[config.norm]
        begin += rank
    return dW


def _pruned(config: methods.GatedRasaConfig) -> nn.Module:
    model = rasa_ext.patch_model(base(), config=config)
    randomize(model, 1)
    with torch.no_grad():
        for i, layer in enumerate(rasa_linears(model).values()):
            layer.d[i % 2 :: 2] = 0.0
    training.prune(model)
    return model


def _gated(layer: RasaLinear) -> Tensor:
    t, pool = layer.own_tensors(), layer.pool_tensors()
    dW = (t["B"] * t["d"][: t["A"].shape[0]]) @ t["A"]
    slots = t.get("slots", range(pool["A"].shape[0] if pool else 0))
    for entry, slot in zip(t["d"][t["A"].shape[0] :], slots, strict=True):
        dW = dW + entry * torch.outer(pool["B"][:, slot], pool["A"][slot])
    return dW


BOOSTER = {"begun": False, "all_trained": False}
CASES = {
    "boosted": Case(lambda: _boosted(methods.BoostedLoraConfig(**WIDE)), _boosted_lora, **BOOSTER),
    "boosted pool": Case(
        lambda: _boosted(methods.BoostedPoolConfig(**WIDE)), _boosted_pool, **BOOSTER
    ),
    "boosted pool, trained on": Case(
        lambda: _boosted(methods.BoostedPoolConfig(2, 3.0, train_past=True, **WIDE)),
        _boosted_pool,
        **BOOSTER,
    ),
    "block-lora": Case(lambda: plain("block-lora", rank=6, blocks=2), _block_lora),
    "sbora-fa": Case(lambda: plain("sbora", rank=3, side="A"), _sbora),
    "sbora-fb": Case(lambda: plain("sbora", rank=3, side="B"), _sbora),
    "gated-rasa": Case(lambda: plain("gated-rasa", rank=4, k=1), _gated),
    "gated-rasa, pruned": Case(lambda: _pruned(methods.GatedRasaConfig(4, 1, **WIDE)), _gated),
    "sora": Case(lambda: plain("sora", rank=4), _gated),
    "sora, pool": Case(lambda: plain("sora", rank=4, k=2), _gated),
    "sora, pruned": Case(lambda: _pruned(methods.SoraConfig(4, **WIDE)), _gated),
    "reslora": Case(lambda: plain("reslora", rank=2, window=1), _reslora),
    "sd-lora": Case(_two_tasks, _sd_lora, begun=False, follows=False),
    "sd-lora, a layer": Case(
        lambda: _two_tasks(tied=False, norm="frobenius"), _sd_lora, begun=False, follows=False
    ),
    "sd-lora, product": Case(
        lambda: _two_tasks(norm="product", rank_schedule={2: 2}),
        _sd_lora,
        begun=False,
        follows=False,
    ),
}
KNOWN.update(CASES)
