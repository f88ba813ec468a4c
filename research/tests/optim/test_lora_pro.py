"""LoraPro as an optimizer: whole runs against dense ones, and common uses of an optimizer."""

from __future__ import annotations

import copy
import io
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext.methods import LoraConfig
from rasa_research.methods import ResLoraConfig
from rasa_research.optim import LoraPro
from research.tests.optim.dense import (
    WIDTHS,
    Ragged,
    build,
    changes,
    flat,
    jacobian,
    parameters,
    set_gradients,
    unflat,
)
from tests.helpers.adapters import patched, same_adapters
from tests.helpers.models import LLAMA, SEQUENTIAL
from tests.helpers.refusals import refused

ROOT = Path(__file__).parents[3]
RIDGE = 1e-4
TO_THE_END = {"ridge": RIDGE, "iterations": 1000, "tolerance": 1e-14}
ADAM = {"lr": 0.005, "betas": (0.8, 0.95), "eps": 1e-8}


class Regression:
    """A task to map x to y by every layer, whose weight gradients have a simple formula."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(5)
        inn, out = WIDTHS
        draw = {"generator": generator, "dtype": torch.float64}
        self.x, self.y = torch.randn(16, inn, **draw), torch.randn(len(model), 16, out, **draw)
        self.weights = torch.stack([layer.base_layer.weight.detach() for layer in model])
        self.biases = torch.stack([layer.base_layer.bias.detach() for layer in model])

    def loss(self, model):
        return sum(
            (layer(self.x) - y).square().mean() for layer, y in zip(model, self.y, strict=True)
        )

    def gradient(self, model) -> torch.Tensor:
        """Compute the gradient of the loss by the layers' weights, (L, out, in)."""
        W = self.weights + changes(model, parameters(model)).detach()
        error = self.x @ W.mT + self.biases.unsqueeze(1) - self.y
        return 2 * error.mT @ self.x / error[0].numel()


def started(layers, config, frozen=()):
    """Build float64 adapters in their initial state, with B = 0."""
    model = build(layers, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("B"):
                parameter.zero_()
            if name in frozen:
                parameter.requires_grad_(False)
    return model


class DenseAdam:
    """Adam over tensors by name, with the bias corrections of its paper."""

    def __init__(self):
        self.t, self.m, self.v = 0, {}, {}

    def direction(self, grads):
        self.t += 1
        (beta1, beta2), eps = ADAM["betas"], ADAM["eps"]
        found = {}
        for name, g in grads.items():
            self.m[name] = beta1 * self.m.get(name, 0) + (1 - beta1) * g
            self.v[name] = beta2 * self.v.get(name, 0) + (1 - beta2) * g**2
            m, v = self.m[name] / (1 - beta1**self.t), self.v[name] / (1 - beta2**self.t)
            found[name] = m / (v.sqrt() + eps)
        return found


def rho(model, J) -> torch.Tensor:
    """Compute the ridge of each element from the means that the docs define."""
    squares = unflat(J.square().sum(0), model)
    ranks = {n: v[:, 0] if n.endswith("A") else v[0] for n, v in squares.items()}
    single = not any("pool" in name for name in ranks)
    found = []
    for name, value in squares.items():
        key = name.rpartition(".")[0]
        mine = [ranks[f"{key}.A"], ranks[f"{key}.B"]] if single else list(ranks.values())
        found.append((RIDGE * torch.cat(mine).mean()).repeat(value.numel()))
    return torch.cat(found)


def dense_step(model, J, gradient):
    """Compute (J^T J + rho)^-1 J^T g, by name."""
    z = torch.linalg.solve(J.T @ J + torch.diag(rho(model, J)), J.T @ gradient.reshape(-1))
    return unflat(z, model)


RUNS = {
    "LoRA": (2, LoraConfig(rank=2, alpha=3.0)),
    "pairs": (2, rasa_ext.RasaConfig(rank=3, k=0)),
    "a pool": (3, rasa_ext.RasaConfig(rank=2, k=1)),
    "a pool, several ranks": (2, Ragged()),
    "a pool, some frozen": (3, rasa_ext.RasaConfig(rank=2, k=1), ("rasa_pool_0_A", "1.A")),
}


@pytest.mark.parametrize("run", RUNS)
def test_fifty_steps(run, figure):
    """Fifty steps equal a loop of dense solutions and Adam; d uses its own gradient."""
    model = started(*RUNS[run])
    theirs, task = copy.deepcopy(model), Regression(model)
    optimizer = LoraPro(model, torch.optim.Adam, **ADAM, **TO_THE_END)
    adam = DenseAdam()
    for _ in range(50):
        optimizer.zero_grad()
        task.loss(model).backward()
        optimizer.step()

        grads = dense_step(theirs, jacobian(theirs), task.gradient(theirs))
        trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        diagonals = [name for name in trained if name.endswith("d")]
        if diagonals:
            found = torch.autograd.grad(task.loss(theirs), [trained[n] for n in diagonals])
            grads |= dict(zip(diagonals, found, strict=True))
        with torch.no_grad():
            for name, step in adam.direction(grads).items():
                trained[name] -= ADAM["lr"] * step
    mine = dict(model.named_parameters())
    apart = max((mine[name] - p).abs().max().item() for name, p in theirs.named_parameters())
    figure(f"LoraPro, {run}: 50 steps differ from dense ones by {apart:.1e}")
    assert min(p.norm() for n, p in mine.items() if n.endswith("B")) > 0.1
    assert apart < 1e-10


@pytest.mark.parametrize("run", RUNS)
def test_fifty_steps_with_moments_of_the_full_gradients(run, figure):
    """Fifty steps equal the published algorithm: Adam over J z, factors solved from its result."""
    model = started(*RUNS[run])
    theirs, task = copy.deepcopy(model), Regression(model)
    optimizer = LoraPro(model, torch.optim.Adam, **ADAM, **TO_THE_END, moments="full")
    adam, losses = DenseAdam(), []
    for _ in range(50):
        optimizer.zero_grad()
        loss = task.loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

        J = jacobian(theirs)
        z = flat(list(dense_step(theirs, J, task.gradient(theirs)).values()))
        trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        diagonals = [name for name in trained if name.endswith("d")]
        full = {"weights": J @ z}
        if diagonals:
            found = torch.autograd.grad(task.loss(theirs), [trained[n] for n in diagonals])
            full |= dict(zip(diagonals, found, strict=True))
        directions = adam.direction(full)
        steps = dense_step(theirs, J, directions.pop("weights")) | directions
        with torch.no_grad():
            for name, step in steps.items():
                trained[name] -= ADAM["lr"] * step
    mine = dict(model.named_parameters())
    apart = max((mine[name] - p).abs().max().item() for name, p in theirs.named_parameters())
    figure(f"LoraPro, full, {run}: 50 steps differ from dense ones by {apart:.1e}")
    assert losses[-1] < losses[0]
    assert apart < 1e-10


@pytest.mark.parametrize("moments", ["factors", "full"])
@pytest.mark.parametrize("run", RUNS)
def test_the_first_steps(run, moments):
    """At B = 0 the gradient of A is zero: A does not move, and nothing is divided by zero."""
    model = started(*RUNS[run])
    task = Regression(model)
    before = copy.deepcopy(model)
    optimizer = LoraPro(model, torch.optim.Adam, lr=1e-3, moments=moments)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        losses.append(task.loss(model))
        losses[-1].backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        if step == 0:
            for name, parameter in parameters(model).items():
                assert torch.equal(parameter, before.get_parameter(name)) == name.endswith("A")
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_what_is_no_factor_keeps_its_gradient():
    model = patched(LLAMA.build(), modules_to_save=["norm"])
    optimizer = LoraPro(model, torch.optim.SGD, lr=0.0)
    LLAMA.loss(model, LLAMA.inputs(0))[1].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    raw = {name: p.grad.clone() for name, p in trained.items()}
    optimizer.step()
    kept = {name for name, p in trained.items() if torch.equal(p.grad, raw[name])}
    assert kept == {name for name in trained if not name.endswith(("A", "B"))}
    assert len(kept) > 7


def test_a_layer_without_gradients():
    """A layer without gradients stays unchanged, and the others are solved with it fixed."""
    model = build(3, rasa_ext.RasaConfig(rank=2, k=1))
    gradient = torch.randn(3, WIDTHS[1], WIDTHS[0], dtype=torch.float64)
    gradient[1] = 0
    set_gradients(model, gradient)
    model[1].A.grad = model[1].B.grad = model[1].d.grad = None
    LoraPro(model, torch.optim.SGD, lr=0.0, ridge=0.0, iterations=1000, tolerance=1e-14).step()
    assert model[1].A.grad is None
    found = {name: p.grad for name, p in parameters(model).items() if p.grad is not None}
    for parameter in (model[1].A, model[1].B):
        parameter.requires_grad_(False)
    J = jacobian(model)
    expected = torch.linalg.pinv(J) @ gradient.reshape(-1)
    torch.testing.assert_close(flat(list(found.values())), expected, rtol=1e-8, atol=1e-9)


def test_no_gradients_at_all():
    model = build(3, rasa_ext.RasaConfig(rank=2, k=1))
    before = copy.deepcopy(model)
    for moments in ("factors", "full"):
        LoraPro(model, torch.optim.Adam, lr=1.0, moments=moments).step()
    assert same_adapters(model, before)


def test_parameters_of_ones_own_choice():
    """Parameters that the optimizer does not get stay fixed; groups have their own rates."""
    model = build(2, rasa_ext.RasaConfig(rank=3, k=0))
    groups = [
        {"params": [layer.A for layer in model], "lr": 0.5},
        {"params": [layer.B for layer in model]},
    ]
    options = {"lr": 0.25, "ridge": 0.0}
    gradient = torch.randn(2, WIDTHS[1], WIDTHS[0], dtype=torch.float64)
    before, J = copy.deepcopy(model), jacobian(model)
    set_gradients(model, gradient)
    LoraPro(model, torch.optim.SGD, params=groups, **options).step()
    steps = unflat(torch.linalg.pinv(J) @ gradient.reshape(-1), before)
    for name, parameter in parameters(model).items():
        expected = before.get_parameter(name) - steps[name] * (0.5 if name[-1] == "A" else 0.25)
        torch.testing.assert_close(parameter, expected)

    only_B = copy.deepcopy(before)
    set_gradients(only_B, gradient)
    raw = only_B[0].A.grad.clone()
    LoraPro(only_B, torch.optim.SGD, params=[layer.B for layer in only_B], **options).step()
    assert torch.equal(only_B[0].A.grad, raw)
    A, B = before[0].A * before[0].d.unsqueeze(1), before[0].B
    nearest = B - 0.25 * gradient[0] @ torch.linalg.pinv(A)
    torch.testing.assert_close(only_B[0].B, nearest)


def trained_on(model, optimizer, steps, task):
    for step in steps:
        optimizer.zero_grad()
        task.loss(model, task.inputs(step))[1].backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["factors", "full"])
def test_going_on_from_a_checkpoint(moments, dtype):
    """A resumed run is bit-identical; moments of full gradients are float32 for any adapter."""

    def begin():
        model = patched(LLAMA.build(), adapter_dtype=dtype)
        options = {"lr": 1e-2, "weight_decay": 0.0, "moments": moments}
        return model, LoraPro(model, torch.optim.AdamW, **options)

    model, optimizer = begin()
    trained_on(model, optimizer, range(3), LLAMA)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    trained_on(model, optimizer, range(3, 6), LLAMA)

    again, its = begin()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    its.load_state_dict(saved["optimizer"])
    full = copy.deepcopy(saved["optimizer"].get("lora_pro"))
    trained_on(again, its, range(3, 6), LLAMA)
    assert same_adapters(again, model)
    if moments == "full":
        layers = its.state_dict()["lora_pro"]
        assert len(layers) == len(LLAMA.targets(LLAMA.build()))
        for name, layer in layers.items():
            assert layer["step"] == 6
            shape = model.get_submodule(name).base_layer.weight.shape
            assert layer["exp_avg"].dtype == layer["exp_avg_sq"].dtype == torch.float32
            assert layer["exp_avg"].shape == layer["exp_avg_sq"].shape == shape
            # Later steps leave the loaded state unchanged.
            assert torch.equal(
                saved["optimizer"]["lora_pro"][name]["exp_avg"], full[name]["exp_avg"]
            )

    its.param_groups[0]["lr"] = 0.0  # like a scheduler does
    trained_on(again, its, [6], LLAMA)
    assert same_adapters(again, model)


def test_schedulers_and_scalers():
    """Both act on the inner optimizer's groups; a scaled gradient is unscaled before the step."""
    model = patched(LLAMA.build())
    plain = copy.deepcopy(model)
    optimizer = LoraPro(model, torch.optim.SGD, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    reference = LoraPro(plain, torch.optim.SGD, lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(LLAMA.loss(model, LLAMA.inputs(step))[1]).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        reference.param_groups[0]["lr"] = 1e-3 * 0.5**step
        trained_on(plain, reference, [step], LLAMA)
    assert optimizer.inner.param_groups[0]["lr"] == 1e-3 / 8
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6)

    before = copy.deepcopy(model)
    optimizer.zero_grad()
    scaler.scale(LLAMA.loss(model, LLAMA.inputs(0))[1] * math.inf).backward()
    scaler.step(optimizer)
    assert same_adapters(model, before)


def test_a_group_added_later():
    model = patched(LLAMA.build())
    extra = nn.Parameter(torch.ones(2))
    optimizer = LoraPro(model, torch.optim.SGD, lr=0.5)
    optimizer.add_param_group({"params": [extra], "lr": 0.25})
    extra.grad = torch.ones(2)
    optimizer.step()
    assert extra.tolist() == [0.75, 0.75]
    optimizer.zero_grad()
    assert extra.grad is None


def test_a_coarser_adapter_is_solved_in_float32():
    fine = patched(LLAMA.build())
    coarse = patched(LLAMA.build(), adapter_dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in coarse.named_parameters():
            fine.get_parameter(name).copy_(parameter)
    LLAMA.loss(coarse, LLAMA.inputs(0))[1].backward()
    for name, parameter in coarse.named_parameters():
        if parameter.grad is not None:
            fine.get_parameter(name).grad = parameter.grad.float()
    for model in (coarse, fine):
        LoraPro(model, torch.optim.SGD, lr=0.0).step()
    for name, parameter in coarse.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, fine.get_parameter(name).grad.bfloat16()), name


def test_what_is_refused():
    model = patched(SEQUENTIAL.build())
    adam = torch.optim.Adam
    refused(lambda: LoraPro(model, adam, ridge=-1.0), model, "ridge", ">= 0")
    refused(lambda: LoraPro(model, adam, tolerance="small"), model, "tolerance", "number")
    refused(lambda: LoraPro(model, adam, iterations=0), model, "iterations", ">= 1")
    refused(lambda: LoraPro(model, adam, moments="half"), model, "moments", "'full'")
    refused(lambda: LoraPro(model, "adam"), model, "inner", "torch.optim")
    refused(lambda: LoraPro(model, torch.optim.LBFGS), model, "inner", "LBFGS")
    refused(lambda: LoraPro("model", adam), model, "model", "nn.Module")
    refused(lambda: LoraPro(SEQUENTIAL.build(), adam), model, "model", "patch_model")
    full = {"moments": "full"}
    refused(lambda: LoraPro(model, torch.optim.AdamW, **full), model, "weight_decay", "0.01")
    refused(lambda: LoraPro(model, adam, amsgrad=True, **full), model, "amsgrad")
    refused(lambda: LoraPro(model, torch.optim.SGD, **full), model, "inner", "SGD")
    optimizer = LoraPro(model, adam, **full)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    refused(lambda: optimizer.step(), model, "weight_decay", "0.1")
    plain = LoraPro(model, adam)
    refused(lambda: plain.step(lambda: 0.0), model, "closure")
    refused(lambda: plain.load_state_dict(optimizer.state_dict()), model, "state_dict", "'full'")
    refused(lambda: optimizer.load_state_dict(plain.state_dict()), model, "'factors'")


def test_factors_that_are_computed_are_refused():
    model = patched(LLAMA.build(), config=ResLoraConfig(rank=2))
    refused(lambda: LoraPro(model, lr=1.0), model, "computed from trained tensors", "ResLoraConfig")


def test_importing_the_package_leaves_it_aside():
    program = "import sys, rasa_ext; sys.exit('rasa_research.optim' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
