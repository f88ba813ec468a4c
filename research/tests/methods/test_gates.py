"""SoRA's gates, and gates on RaSA's pool: proximal steps, pruning, balancing."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import rasa_ext
from rasa_ext.training import parameter_groups
from rasa_research import methods, training
from research.tests.methods import cases  # noqa: F401 - which makes them known
from tests.helpers import experts
from tests.helpers.adapter_folders import check_large_field
from tests.helpers.methods import base, case, inputs, randomize, rasa_linears

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SORA = methods.SoraConfig(4, alpha=8.0, adapter_dtype=torch.float64)
POOL = methods.GatedRasaConfig(4, 2, adapter_dtype=torch.float64)


def patched(config) -> nn.Module:
    model = rasa_ext.patch_model(base(), config=config)
    randomize(model, 1)
    return model


def gates(model) -> torch.Tensor:
    config = next(iter(rasa_linears(model).values())).config
    return torch.cat(
        [
            layer.d.detach()[config.gate_entries(*config.ranks_at(layer.spec))]
            / config.gate_scale(layer.spec.num_layers)
            for layer in rasa_linears(model).values()
        ]
    )


def loss_of(model, x) -> torch.Tensor:
    return (model(x) - x.roll(1, 0)).square().mean()


@pytest.mark.parametrize("config", [SORA, POOL], ids=["sora", "pool"])
def test_the_soft_rule_is_the_proximal_point(config):
    model = patched(config)
    before = gates(model)
    training.ProximalGates(model, 0.11).step()
    line = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    costs = 0.5 * (line - before.unsqueeze(1)).square() + 0.11 * line.abs()
    torch.testing.assert_close(gates(model), line[costs.argmin(1)], rtol=0, atol=1e-4)


def test_only_gates_move():
    model = patched(POOL)
    before = {name: layer.d.detach().clone() for name, layer in rasa_linears(model).items()}
    training.ProximalGates(model, 0.1).step()
    for name, layer in rasa_linears(model).items():
        assert torch.equal(layer.d[:2], before[name][:2])
        assert not torch.equal(layer.d[2:], before[name][2:])


def test_the_official_rule():
    """The official rule shrinks gates above the threshold, then zeroes gates below it."""
    model = patched(SORA)
    layer = next(iter(rasa_linears(model).values()))
    given = torch.tensor([0.05, -0.15, 0.21, -0.5], dtype=torch.float64)
    with torch.no_grad():
        layer.d.copy_(given * 2)  # s = alpha / r = 2
    training.ProximalGates(model, 0.1, rule="official").step()
    expected = torch.tensor([0.0, 0.0, 0.11, -0.4], dtype=torch.float64)
    torch.testing.assert_close(layer.d.detach() / 2, expected, **EXACT)


def test_a_diagonal_trained_as_gates_are():
    """With the rate, threshold and L1 of parameter_groups, d = s g follows g over 50 steps."""

    class Gated(nn.Module):
        def __init__(self, layer: rasa_ext.RasaLinear) -> None:
            super().__init__()
            self.W, self.bias = layer.base_layer.weight, layer.base_layer.bias
            self.A, self.B = (nn.Parameter(t.detach().clone()) for t in (layer.A, layer.B))
            self.g = nn.Parameter(layer.d.detach() / 2)

        def forward(self, x):
            return x @ self.W.t() + self.bias + 2 * ((x @ self.A.t()) * self.g) @ self.B.t()

    torch.manual_seed(0)
    model = rasa_ext.patch_model(nn.Sequential(nn.Linear(6, 5)).double(), config=SORA)
    randomize(model, 3)
    plain = Gated(model[0])
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    ours = torch.optim.AdamW(parameter_groups(model, lr=1e-2, eps=1e-6))
    theirs = torch.optim.AdamW([plain.A, plain.B, plain.g], lr=1e-2, eps=1e-6, weight_decay=0.0)
    steps = training.ProximalGates(model, 2e-3, l1=0.03)
    for _ in range(50):
        ((model(x) - y).square().mean() + steps.penalty()).backward()
        ours.step()
        steps.step()
        ours.zero_grad()
        ((plain(x) - y).square().mean() + 0.03 * plain.g.abs().mean()).backward()
        theirs.step()
        with torch.no_grad():
            plain.g.copy_(plain.g.sign() * (plain.g.abs() - 2e-3).clamp(min=0))
        theirs.zero_grad()
    torch.testing.assert_close(model[0].d / 2, plain.g, **EXACT)
    torch.testing.assert_close(model[0].B, plain.B, **EXACT)


def test_gates_at_zero_come_back():
    model, x = patched(POOL), inputs(20)
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.5)
    training.ProximalGates(model, 100.0).step()
    assert not gates(model).any()
    loss_of(model, x).backward()
    optimizer.step()
    assert gates(model).all()


@pytest.mark.parametrize(
    "config", [SORA, POOL, methods.SoraConfig(4, 1, 8.0, adapter_dtype=torch.float64)]
)
def test_pruning_changes_no_output_and_lowers_ranks(config):
    model, x = patched(config), inputs()
    training.ProximalGates(model, 0.5 * gates(model).abs().median().item()).step()
    training.ProximalGates(model, gates(model).abs().median().item()).step()
    before = model(x)
    ranks = [layer.effective_rank for layer in rasa_linears(model).values()]
    assert training.prune(model)[0] == max(ranks)
    left = [layer.effective_rank for layer in rasa_linears(model).values()]
    assert sum(left) < sum(ranks)
    torch.testing.assert_close(model(x), before, **EXACT)
    # The remaining ranks can be trained and pruned again.
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    loss_of(model, x).backward()
    optimizer.step()
    training.ProximalGates(model, gates(model).abs().median().item()).step()
    before = model(x)
    training.prune(model)
    torch.testing.assert_close(model(x), before, **EXACT)
    assert sum(layer.effective_rank for layer in rasa_linears(model).values()) < sum(left)


@pytest.mark.parametrize("config", [SORA, POOL])
def test_steps_made_before_pruning_go_on_after_it(config):
    model = patched(config)
    steps = training.ProximalGates(model, gates(model).abs().median().item())
    steps.step()
    open_before = steps.open_gates()[0]
    training.prune(model)
    before = gates(model)
    assert steps.open_gates() == (open_before, open_before) == (len(before), len(before))
    steps.step()
    assert (gates(model).abs() < before.abs()).all()


def test_a_slot_that_no_layer_reads_leaves_the_pool():
    model = patched(POOL)
    with torch.no_grad():
        for layer in rasa_linears(model).values():
            layer.d[3] = 0.0
    training.prune(model)
    assert {layer.pool.A.shape[0] for layer in rasa_linears(model).values()} == {5}
    with torch.no_grad():
        for layer in rasa_linears(model).values():
            layer.d[2:] = 0.0
    x = inputs()
    before = model(x)
    training.prune(model)
    assert {layer.effective_rank for layer in rasa_linears(model).values()} == {2}
    torch.testing.assert_close(model(x), before, **EXACT)


def test_the_true_support_is_found():
    """A layer that needs two of six slots ends with these two, from equal starts."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(8, 8, bias=False).double())
    config = methods.GatedRasaConfig(6, 6, adapter_dtype=torch.float64)
    model = rasa_ext.patch_model(copy.deepcopy(plain), config=config)
    layer = model[0]
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(8, 6, dtype=torch.float64)).Q
        layer.pool.A.copy_(basis.t())
        layer.pool.B.copy_(basis)
        layer.pool.requires_grad_(False)
        target = plain[0].weight + 0.7 * basis[:, 1:2] @ basis[:, 1:2].t()
        target -= 0.5 * basis[:, 4:5] @ basis[:, 4:5].t()
    x = torch.randn(200, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD([layer.d], lr=0.2)
    steps = training.ProximalGates(model, 2e-3)
    for _ in range(400):
        optimizer.zero_grad()
        (model(x) - x @ target.t()).square().sum(1).mean().backward()
        optimizer.step()
        steps.step()
    assert steps.open_gates() == (2, 6)
    training.prune(model)
    assert layer.own_tensors()["slots"].tolist() == [0, 1]
    assert layer.pool.A.shape == (2, 8)
    torch.testing.assert_close(layer.pool.A, basis.t()[[1, 4]], **EXACT)


@pytest.mark.parametrize(
    "name", ["rasa", "sora", "sora, pool", "gated-rasa, pruned", "sora, pruned"]
)
def test_balancing_changes_no_output(name):
    model, x = case(name), inputs()
    before = model(x)
    training.balance(model)
    torch.testing.assert_close(model(x), before, **EXACT)
    for layer in rasa_linears(model).values():
        tensors = [*layer.own_tensors().items(), *layer.pool_tensors().items()]
        for field, tensor in tensors:
            if field in "AB":
                norms = tensor.norm(dim=1 if field == "A" else 0)
                torch.testing.assert_close(norms, torch.ones_like(norms), **EXACT)


def test_balancing_leaves_a_fresh_adapter_alone():
    model = rasa_ext.patch_model(base(), config=SORA)
    before = copy.deepcopy(model.state_dict())
    training.balance(model)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_the_penaltys_gradient():
    model, other = patched(POOL), patched(POOL)
    training.ProximalGates(model, 0.0, l1=0.3).penalty().backward()
    for layer in rasa_linears(other).values():
        layer.d.grad = torch.zeros_like(layer.d)
    training.ProximalGates(other, 0.0, l1=0.3).add_penalty_gradient()
    for mine, its in zip(rasa_linears(model).values(), rasa_linears(other).values(), strict=True):
        torch.testing.assert_close(mine.d.grad, its.d.grad, **EXACT)


@pytest.mark.parametrize("first", [1.0, 1e-3])
def test_the_official_schedules(first):
    """Seven stages have the values of numpy's linspace in the official code."""
    last, exp, log = 7 * first, math.exp, math.log
    even = [i / 6 for i in range(7)]
    expected = {
        "linear": [first + (last - first) * i for i in even],
        "log": [log(exp(first) + (exp(last) - exp(first)) * i) for i in even],
        "exp": [exp(log(first) + (log(last) - log(first)) * i) for i in even],
    }
    for kind, values in expected.items():
        schedule = training.threshold_schedule(first, last, stages=7, steps=10, kind=kind)
        assert [schedule(10 * i) for i in range(7)] == pytest.approx(values, rel=1e-9)
        assert schedule(9) == schedule(0)
        assert schedule(1000) == schedule(60)


def test_a_threshold_of_the_steps():
    model = patched(SORA)
    steps = training.ProximalGates(model, lambda step: 10.0 * (step == 1))
    before = gates(model)
    steps.step()
    assert torch.equal(gates(model), before)
    state = steps.state_dict()
    resumed = training.ProximalGates(model, steps.threshold)
    resumed.load_state_dict(state)
    resumed.step()
    assert not gates(model).any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: training.ProximalGates(m, -1.0), "threshold"),
        (lambda m: training.ProximalGates(m, 1.0, rule="hard"), "rule"),
        (lambda m: training.ProximalGates(m, 1.0, l1=-0.1), "l1"),
        (lambda m: training.threshold_schedule(0, 1, 0, 1), "stages"),
        (lambda m: training.threshold_schedule(0, 1, 1, 1, "cubic"), "kind"),
        (lambda m: training.threshold_schedule(0, 1, 1, 1.5), "steps"),
        (lambda m: training.threshold_schedule(-1, 1, 1, 1), "first"),
        (lambda m: training.threshold_schedule(0, 1, 2, 1, "exp"), "first"),
        (lambda m: training.ProximalGates(m, math.nan), "threshold"),
        (lambda m: training.ProximalGates(m, math.inf), "^threshold: .*finite"),
        (lambda m: training.threshold_schedule(0, math.inf, 2, 1), "^last: .*finite"),
        (lambda m: training.ProximalGates(m, lambda step: math.nan).step(), "threshold"),
        (lambda m: training.ProximalGates(m, lambda step: -1.0).step(), "threshold"),
        (lambda m: training.ProximalGates(m, lambda step: None).step(), "threshold"),
        (lambda m: training.ProximalGates(rasa_ext.patch_model(base(), 4, 1), 1.0), "GatedRasa"),
        (lambda m: training.prune(rasa_ext.patch_model(base(), 4, 1)), "GatedRasa"),
        (lambda m: training.prune(base()), "patch"),
        (
            lambda m: training.balance(
                rasa_ext.patch_model(base(), config=rasa_ext.methods.LoraConfig())
            ),
            "RasaConfig, got LoraConfig",
        ),
        (lambda m: methods.GatedRasaConfig(gate_threshold=-1), "gate_threshold: .* >= 0, got -1"),
        (lambda m: methods.GatedRasaConfig(gate_threshold=math.nan), "gate_threshold"),
        (lambda m: methods.SoraConfig(gate_threshold="1"), "gate_threshold: expected a number"),
        (lambda m: methods.GatedRasaConfig(experts="slot", gate_threshold=0.1), "experts='slot'"),
        (lambda m: methods.GatedRasaConfig(gate_rate=0), "gate_rate: .* above 0, got 0"),
        (lambda m: methods.SoraConfig(prune=1), "prune: expected True or False, got 1"),
        (lambda m: methods.SoraConfig(4, k=5), "k: expected 0 <= k <= rank"),
        (lambda m: methods.GatedRasaConfig(kept={"0.up_proj": (1, 2)}), "kept: expected three"),
        (lambda m: methods.SoraConfig().callbacks(m), "gate_threshold: expected a number with"),
        (
            lambda m: methods.GatedRasaConfig(k=0, gate_threshold=0.1).callbacks(
                rasa_ext.patch_model(base(), config=methods.GatedRasaConfig(k=0))
            ),
            "gates, from SoraConfig or from GatedRasaConfig with k > 0",
        ),
    ],
)
def test_bad_input(make, named):
    model = patched(SORA)
    before = gates(model)
    with pytest.raises((ValueError, TypeError), match=named):
        make(model)
    assert torch.equal(gates(model), before)


def test_a_file_of_more_ranks_than_it_has(tmp_path):
    """The file is refused before a tensor of that size is allocated."""
    kept = {"model.layers.0.self_attn.q_proj": [10**8, 10**8, 10**8]}
    check_large_field(methods.GatedRasaConfig(4, 1), "rasa_kept", kept, tmp_path)


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, "x"], [1, 2, -3], "abc", 4])
def test_counts_in_a_file(counts):
    settings = {**methods.SoraConfig(4).to_dict(), "rasa_kept": {"0.up_proj": counts}}
    with pytest.raises(ValueError, match="kept"):
        rasa_ext.methods.read_method(settings)


def test_a_merged_adapter_is_not_pruned():
    model = patched(SORA)
    rasa_ext.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        training.prune(model)


@pytest.mark.parametrize("kind", [methods.SoraConfig, methods.GatedRasaConfig])
def test_a_learning_rate_of_gates(kind):
    config = kind(4, 1, gate_rate=5.0, adapter_dtype=torch.float64)
    model = patched(config)
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for layer in rasa_linears(model).values():
        scale = config.alpha / 4 if kind is methods.SoraConfig else 1.0
        assert found[id(layer.d)] == pytest.approx((5e-2 * scale, 0.0))
        assert found[id(layer.A)] == (1e-2, 0.1)


def test_a_rank_pattern_of_no_layer_is_refused():
    config = methods.SoraConfig(4, rank_pattern={"q_proj": 2})
    model = base()
    with pytest.raises(ValueError, match=r"rank_pattern: .*'q_proj' matches none of 6"):
        rasa_ext.patch_model(model, config=config)
    assert not rasa_linears(model)


def test_experts_have_no_gates():
    config = methods.GatedRasaConfig(4, 1, experts="slot")
    model = rasa_ext.patch_model(experts.model("mixtral"), config=config)
    for refused in (lambda: training.ProximalGates(model, 0.1), lambda: training.prune(model)):
        with pytest.raises(ValueError, match=r"linear layers, but .* has adapted experts"):
            refused()
    with pytest.raises(ValueError, match="balance is for adapters of linear layers"):
        training.balance(model)


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("pruned", [True, False])
def test_only_a_training_to_its_end_is_pruned(pruned, steps, tmp_path, capsys):
    """Training that stops early leaves all ranks, so that it can resume."""
    model = patched(dataclasses.replace(SORA, gate_threshold=5.0, prune=pruned)).float()
    callbacks = model[0].up_proj.config.callbacks(model)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == steps

    train(model, tmp_path, [*callbacks, Stop()], max_steps=4)
    ranks = {layer.effective_rank for layer in rasa_linears(model).values()}
    assert ranks == ({0} if pruned and steps == 4 else {4})
    said = "0 of 24 gates are open"
    if pruned:
        said += "; without the others the effective rank is 0, from 4"
    assert (f"{said}.\n" in capsys.readouterr().out) == (steps == 4)


def train(model, directory, callbacks, max_steps) -> None:

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return {"loss": self.inner(x).square().mean()}

    arguments = TrainingArguments(
        directory,
        max_steps=max_steps,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
    )
    data = [{"x": torch.randn(9)} for _ in range(16)]
    Trainer(Wrapped(), arguments, train_dataset=data, callbacks=callbacks).train()


def test_as_a_callback(tmp_path):
    model = patched(SORA).float()
    steps = training.ProximalGates(model, 5.0, l1=0.1)
    train(model, tmp_path, [steps.callback()], max_steps=2)
    assert steps.steps == 2
    assert steps.open_gates()[0] == 0
