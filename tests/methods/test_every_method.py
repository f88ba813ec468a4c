"""Tests for every method, against its formula in float64."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import rasa_ext
from rasa_ext import ops
from rasa_ext.serving.expansion import expand
from tests.helpers.methods import (
    CASES,
    KNOWN,
    base,
    case,
    changes,
    inputs,
    plain_forward,
    rasa_linears,
)

EXACT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def name(request) -> str:
    return request.param


def gradients(model, y):
    parameters = [p for p in rasa_ext.adapter_parameters(model) if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    y.square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def test_outputs_and_gradients_are_the_formulas(name):
    model, x = case(name), inputs()
    y = model(x)
    expected = plain_forward(model, changes(model, name), x)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(model.eval()(x), expected.detach(), **EXACT)
    torch.testing.assert_close(gradients(model, y), gradients(model, expected), **EXACT)


def test_fresh_it_computes_what_the_base_does(name):
    config = next(iter(rasa_linears(case(name)).values())).config
    plain = base()
    if KNOWN[name].begun:
        model = rasa_ext.patch_model(base(), config=config)
        torch.testing.assert_close(model(inputs()), plain(inputs()), **EXACT)


def test_saved_and_loaded(name, tmp_path):
    model = case(name)
    rasa_ext.save_adapter(model, tmp_path)
    again = rasa_ext.load_adapter(base(), tmp_path)
    assert torch.equal(again(inputs()), model(inputs()))
    for each in (model, again):
        assert all(map(torch.Tensor.is_contiguous, each.state_dict().values()))
        assert all(map(torch.Tensor.is_contiguous, gradients(each, each(inputs()))))
    configs = [next(iter(rasa_linears(each).values())).config for each in (model, again)]
    assert configs[0] == configs[1]
    trained = sum(p.requires_grad for p in again.parameters())
    assert trained >= sum(p.requires_grad for p in model.parameters())


def test_merged_and_unmerged(name):
    model, x = case(name).eval(), inputs()
    before = copy.deepcopy(dict(model.state_dict()))
    y = model(x)
    rasa_ext.merge(model)
    torch.testing.assert_close(model(x), y, **EXACT)
    rasa_ext.unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(x), y)
    plain = rasa_ext.merge_and_unload(model)
    torch.testing.assert_close(plain(x), y, **EXACT)


def test_weight_changes_and_an_export(name, tmp_path):
    model = case(name)
    rasa_ext.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    of_model = dict(rasa_ext.delta_weights(model))
    for path, dW in changes(model, name).items():
        torch.testing.assert_close(of_model[path], dW.detach().float())
        A, B = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        assert len(A) <= config["r"]
        product = config["lora_alpha"] / config["r"] * B.double() @ A.double()
        torch.testing.assert_close(product, dW.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keeps", [None, lambda name: True], ids=["expanded", "pools kept"])
def test_a_server_reads_the_formula_from_the_folder(name, keeps, tmp_path):
    model = case(name)
    rasa_ext.save_adapter(model, tmp_path)
    found = expand(tmp_path, base, keeps)
    for path, expected in changes(model, name).items():
        A, B = (found.tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        assert len(A) <= found.settings["r"] == found.settings["lora_alpha"]
        dW = B.double() @ A.double()
        for pool in found.pools:
            if path in pool.d:
                dW += (pool.B * pool.d[path].double()) @ pool.A
        torch.testing.assert_close(dW, expected.detach(), rtol=1e-6, atol=1e-6)


def test_copied(name):
    model = case(name)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(inputs()), model(inputs()))
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(copied):
            parameter.add_(1.0)
    assert not torch.equal(copied(inputs()), model(inputs()))
    torch.testing.assert_close(
        copied(inputs()), plain_forward(copied, changes(copied, name), inputs()), **EXACT
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(name, reentrant):
    model, x = case(name), inputs().requires_grad_()
    y = x
    for block in model:
        y = checkpoint(block, y, use_reentrant=reentrant)
    torch.testing.assert_close(y, model(x), **EXACT)
    torch.testing.assert_close(gradients(model, y), gradients(model, model(x)), **EXACT)


@torch.no_grad()
def test_a_write_to_any_source_is_seen(name):
    model, x = case(name).eval(), inputs()
    model(x)
    sources = {
        id(source): source
        for layer in rasa_linears(model).values()
        for source in layer.adapter().sources()
        if source.is_floating_point()
    }
    assert sources
    for source in sources.values():
        source.mul_(1.5)
        expected = plain_forward(model, changes(model, name), x)
        if not KNOWN[name].follows:
            expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(model(x), expected, **EXACT)


@torch.no_grad()
def test_a_forward_packs_every_layer_once(name, monkeypatch):
    model, pack_group, packed = case(name).eval(), ops.pack_group, []

    def counting(A, *others):
        packed.extend(A)
        return pack_group(A, *others)

    monkeypatch.setattr(ops, "pack_group", counting)
    layers = len(rasa_linears(model))
    for forwards in (1, 2):
        model(inputs())
        assert len(packed) == forwards * layers


def test_summary_counts_what_is_trained(name):
    model = case(name)
    result = rasa_ext.summary(model)
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    if KNOWN[name].all_trained:
        assert result.adapter == result.trainable == sum(trained.values())
    ranks = [layer.effective_rank for layer in rasa_linears(model).values()]
    assert max(row.R for row in result) == max(ranks)
    for row in result:
        R = f"{row.R_min}-{row.R}" if row.R_min < row.R else row.R
        assert f" {R} " in str(result)


def test_it_trains_and_the_base_stays(name):
    model, x = case(name), inputs(20)
    weights = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(rasa_ext.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - x.roll(1, 0)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[n], w) for n, w in weights.items())
