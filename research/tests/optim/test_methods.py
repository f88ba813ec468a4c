"""LoraPro over every method: a dense least-norm step, or a refusal that says why."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import rasa_ext
from rasa_research import methods, training
from rasa_research.optim import LoraPro
from research.tests.methods import cases
from tests.helpers.methods import (
    CASES,
    base,
    case,
    changes,
    inputs,
    randomize,
    rasa_linears,
)

TO_THE_END = {"ridge": 0.0, "iterations": 2000, "tolerance": 1e-14}
COMPUTED = {
    "reslora": "ResLoraConfig",
    "gated-rasa, pruned": "GatedRasaConfig",
    "sd-lora, a layer": "SdLoraConfig",
}
"""Refused methods: the factors in use are concatenated, picked from a pool or normalized."""
FREE = ("d", "m", "stack_d")
"""Names of trained parameters that are not factors."""
WIDE = {"adapter_dtype": torch.float64}


def trained(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(model, name: str, factors: list[Tensor]) -> Tensor:
    """Compute J (all layers' out * in, the factors' elements) row by row from the formula."""
    flat = torch.cat([dW.flatten() for dW in changes(model, name).values()])
    rows = []
    for number in flat:
        found = torch.autograd.grad(number, factors, retain_graph=True, allow_unused=True)
        pairs = zip(factors, found, strict=True)
        parts = [torch.zeros_like(factor) if g is None else g for factor, g in pairs]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def least_norm_gradients(model, name: str) -> tuple[Tensor, Tensor]:
    """Return LoraPro's gradients for a random weight gradient g, and J^+ g by dense matrices."""
    parameters = trained(model)
    factors = {n: p for n, p in parameters.items() if re.split(r"\.|pool_\d_", n)[-1] not in FREE}
    J = jacobian(model, name, list(factors.values()))
    g = torch.randn(len(J), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = (J.t() @ g).split([factor.numel() for factor in factors.values()])
    for factor, part in zip(factors.values(), parts, strict=True):
        factor.grad = part.view(factor.shape).clone()
    others = {n: p for n, p in parameters.items() if n not in factors}
    for parameter in others.values():
        parameter.grad = torch.ones_like(parameter)
    LoraPro(model, torch.optim.SGD, lr=0.0, **TO_THE_END).step()
    assert all((p.grad == 1).all() for p in others.values())
    z = torch.cat([factor.grad.flatten() for factor in factors.values()])
    return z, torch.linalg.pinv(J, rtol=1e-11) @ g


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Compare by norm and by element; small elements may err by as much as large ones."""
    size = expected.norm().item()
    assert (found - expected).norm() <= 1e-9 * size
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=max(1e-8, 1e-11 * size))


@pytest.mark.parametrize("name", [name for name in (*CASES, *cases.CASES) if name not in COMPUTED])
def test_the_step_is_dense_least_squares(name):
    assert_near(*least_norm_gradients(case(name), name))


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_refused(name):
    with pytest.raises(
        ValueError, match=f"computed from trained tensors by {COMPUTED[name]}.*another opt"
    ):
        LoraPro(case(name), lr=1.0)


@pytest.mark.parametrize("name", ["sora", "sora, pool"])
def test_closed_gates(name):
    """Ranks with closed gates change nothing, so they have no gradient and take no step."""
    model = case(name)
    with torch.no_grad():
        for i, layer in enumerate(rasa_linears(model).values()):
            layer.d[i % 3 :: 3] = 0.0
    assert_near(*least_norm_gradients(model, name))


def loss_of(model, x) -> Tensor:
    return (model(x) - x.roll(1, 0)).square().mean()


class DenseSora:
    """SoRA's steps under LoraPro with dense matrices: J^+ g by pinv, Adam, and soft threshold.

    The model is one linear layer y = x (W + B diag(d) A)^T; d has its own gradient.
    """

    def __init__(self, layer, lr: float, betas: tuple[float, float], by: float) -> None:
        self.W, self.bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
        self.at = [p.detach().clone() for p in (layer.A, layer.B, layer.d)]
        self.m, self.v = ([torch.zeros_like(p) for p in self.at] for _ in range(2))
        self.lr, self.betas, self.by, self.t = lr, betas, by, 0

    def step(self, x: Tensor, y: Tensor) -> None:
        A, B, d = self.at
        error = x @ (self.W + B @ torch.diag(d) @ A).t() + self.bias - y
        g = 2 * error.t() @ x / error.numel()
        out, r = B.shape
        eye = torch.eye
        of_A = torch.einsum("or,ij->oirj", B * d, eye(A.shape[1], dtype=A.dtype))
        of_B = torch.einsum("op,ri->oipr", eye(out, dtype=A.dtype), d.unsqueeze(1) * A)
        J = torch.cat((of_A.flatten(2), of_B.flatten(2)), 2).flatten(0, 1)
        z = torch.linalg.pinv(J, rtol=1e-9) @ g.flatten()
        grads = [
            z[: A.numel()].view_as(A),
            z[A.numel() :].view(out, r),
            torch.einsum("oi,or,ri->r", g, B, A),
        ]
        self.t += 1
        for i, grad in enumerate(grads):
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * grad
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * grad**2
            m, v = (
                each / (1 - beta**self.t)
                for each, beta in zip((self.m[i], self.v[i]), self.betas, strict=True)
            )
            self.at[i] = self.at[i] - self.lr * m / (v.sqrt() + 1e-8)
        self.at[2] = self.at[2].sign() * (self.at[2].abs() - self.by).clamp(min=0)


def test_a_sora_s_steps_with_gates_that_close():
    """Thirty steps with a proximal step after each match dense ones, though a gate closes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7, dtype=torch.float64))
    rasa_ext.patch_model(model, config=methods.SoraConfig(rank=3, alpha=3.0, **WIDE))
    randomize(model, 2)
    layer = model[0]
    with torch.no_grad():
        layer.d.copy_(torch.tensor([0.9, -0.05, 0.4]))
    x, y = torch.randn(16, 9, dtype=torch.float64), torch.randn(16, 7, dtype=torch.float64)
    options = {"lr": 1e-3, "betas": (0.8, 0.95)}
    dense = DenseSora(layer, **options, by=4e-3)
    optimizer = LoraPro(model, torch.optim.Adam, **options, ridge=0.0)
    gates = training.ProximalGates(model, threshold=4e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        gates.step()
        dense.step(x, y)
    for mine, theirs in zip((layer.A, layer.B, layer.d), dense.at, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-7, atol=1e-9)
    assert gates.open_gates() == (2, 3)
    before = model(x)
    assert training.prune(model) == (3, 2)
    torch.testing.assert_close(model(x), before)
    LoraPro(model, torch.optim.Adam, lr=1e-3)  # pruning made new parameters


def test_an_sd_lora_s_tasks():
    """At each task the newest pair takes least-squares steps, whatever came before it."""
    model, x = case("sd-lora"), inputs(20)
    for task in range(3):
        optimizer = LoraPro(model, torch.optim.AdamW, lr=1e-3)
        losses = []
        for _ in range(8):
            loss = loss_of(model, x.roll(task, 1))
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        found, expected = least_norm_gradients(copy.deepcopy(model), "sd-lora")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        training.next_task(model)


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_boosters_are_sequential_merges(moments):
    """Every booster starts without moments, including the moments of full gradients."""

    def patched(model):
        config = methods.BoostedLoraConfig(**WIDE)
        return rasa_ext.patch_model(model, config=config)

    def optimizer_of(model):
        options = {"lr": 1e-2, "weight_decay": 0.0, "moments": moments}
        return LoraPro(model, torch.optim.AdamW, **options)

    x, model, merged = inputs(20), patched(base()), patched(base())
    optimizer = optimizer_of(model)
    boosting = training.Boosting(model, optimizer, steps=3)
    for _ in range(4):
        for name, layer in rasa_linears(merged).items():
            mine = rasa_linears(model)[name]
            with torch.no_grad():
                layer.A.copy_(mine.A)
                layer.B.copy_(mine.B)
        fresh = optimizer_of(merged)
        for _ in range(3):
            for each, its in ((model, optimizer), (merged, fresh)):
                loss_of(each, x).backward()
                its.step()
                its.zero_grad()
            boosting.step()
        torch.testing.assert_close(model(x), merged(x), rtol=1e-9, atol=1e-11)
        merged = patched(rasa_ext.merge_and_unload(merged))


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("moments", ["factors", "full"])
def test_a_pool_s_booster_begins_as_with_a_fresh_optimizer(moments, layers, past):
    config = methods.BoostedPoolConfig(train_past=past, **WIDE)
    model, x = rasa_ext.patch_model(base(), config=config), inputs(20)
    options = {"lr": 1e-3, "weight_decay": 0.0, "moments": moments}
    optimizer = LoraPro(model, torch.optim.AdamW, **options)
    boosting = training.Boosting(model, optimizer, steps=4, layers=layers, seed=3)
    for _ in range(8):
        loss_of(model, x).backward()
        optimizer.step()
        boosting.step()
        optimizer.zero_grad()
    other = copy.deepcopy(model)
    fresh = LoraPro(other, torch.optim.AdamW, **options)
    for _ in range(3):
        for each, its in ((model, optimizer), (other, fresh)):
            loss_of(each, x).backward()
            its.step()
            its.zero_grad()
    for mine, theirs in zip(
        rasa_ext.adapter_parameters(model), rasa_ext.adapter_parameters(other), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
