"""The gradients that LoraPro writes equal dense least squares: z = J^+ g."""

from __future__ import annotations

import itertools

import pytest
import torch

import rasa_ext
from rasa_ext.methods import LoraConfig
from rasa_research.methods import SboraConfig
from rasa_research.optim import LoraPro, least_norm
from rasa_research.optim.groups import find_groups
from research.tests.optim.dense import (
    WIDTHS,
    Ragged,
    build,
    changes,
    gradients,
    jacobian,
    parameters,
    set_gradients,
    unflat,
)

pytestmark = pytest.mark.filterwarnings("ignore:groups")  # a group of one layer warns

EXACT = {"ridge": 0.0, "iterations": 1000, "tolerance": 1e-14}
CASES = {
    "LoRA": (2, LoraConfig(rank=3, alpha=4.0)),
    "a pair": (1, rasa_ext.RasaConfig(rank=3, k=0)),
    "pairs": (3, rasa_ext.RasaConfig(rank=3, k=0)),
    "pairs of several ranks": (3, Ragged(pooled=False)),
    "pairs without d": (2, Ragged(pooled=False, scale=None)),
    "a pool": (3, rasa_ext.RasaConfig(rank=2, k=1)),
    "a pool of one layer": (1, rasa_ext.RasaConfig(rank=3, k=1)),
    "nothing but a pool": (3, rasa_ext.RasaConfig(rank=1, k=1)),
    "a pool, several ranks": (2, Ragged()),
    "a pool without d": (2, Ragged(scale=None)),
}
FROZEN = {
    "A": (CASES["pairs"], ".A"),
    "B": (CASES["pairs"], ".B"),
    "one layer's A": (CASES["pairs"], "1.A"),
    "A beside a pool": (CASES["a pool"], "1.A"),
    "the pool": (CASES["a pool"], ("pool_0_A", "pool_0_B")),
    "the pool's A": (CASES["a pool"], "pool_0_A"),
    "all but the pool": (CASES["a pool"], ("0.A", "0.B", "1.A", "1.B", "2.A", "2.B")),
}


def solved(model, gradient, **options):
    """Return z, which LoraPro writes for the gradients J^T g; the parameters do not change."""
    set_gradients(model, gradient)
    LoraPro(model, torch.optim.SGD, lr=0.0, **{**EXACT, **options}).step()
    return gradients(model)


def draw(model):
    return torch.randn(len(model), WIDTHS[1], WIDTHS[0], dtype=torch.float64)


def check(model):
    gradient = draw(model)
    J, g = jacobian(model).cpu(), gradient.reshape(-1)
    z = solved(model, gradient.to(next(model.parameters()).device)).cpu()
    expected = torch.linalg.lstsq(J, g.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close((J @ z - g).norm(), (J @ expected - g).norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(J.T @ (J @ z), J.T @ g, rtol=1e-9, atol=1e-9)
    # Callers check that J has a null space, which z must stay out of.
    return J.shape[1] - torch.linalg.matrix_rank(J).item()


@pytest.mark.parametrize("case", CASES)
def test_the_solution_is_the_pseudo_inverse_s(case, device):
    layers, config = CASES[case]
    assert check(build(layers, config, device)) > 0


@pytest.mark.parametrize("case", FROZEN)
def test_what_is_frozen_takes_no_part(case):
    (layers, config), names = FROZEN[case]
    model = build(layers, config)
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            parameter.requires_grad_(False)
    assert len(parameters(model)) < len(parameters(build(layers, config)))
    check(model)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=4.0, train_A=False),
        SboraConfig(rank=3, alpha=4.0, side="A"),
        SboraConfig(rank=3, alpha=4.0, side="B"),
    ],
    ids=["LoRA-FA", "SBoRA-FA", "SBoRA-FB"],
)
def test_one_trained_factor(config):
    """The gradient is G_B (A A^T)^-1 / s^2, or the like for A; for SBoRA A A^T is the identity."""
    model = build(2, config)
    for layer in model:
        A, _, B, _, d = layer.adapter().factors()
        parameter, fixed = (B, A) if B.requires_grad else (A, B.t())
        raw = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.grad = raw.clone()
        gram = fixed @ fixed.T * d[0] ** 2
        if isinstance(config, SboraConfig):
            torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64) * d[0] ** 2)
        inverse = torch.linalg.inv(gram)
        layer.expected = raw @ inverse if parameter is B else inverse @ raw
        layer.found = parameter
    LoraPro(model, torch.optim.SGD, lr=0.0, ridge=0.0).step()
    for layer in model:
        torch.testing.assert_close(layer.found.grad, layer.expected)


def paper(A, B, G_A, G_B, s):
    """Compute g_A, g_B and X of a pair by the published formulas, X by a Kronecker product."""
    BB, AA = B.T @ B, A @ A.T
    eye = torch.eye(len(A), dtype=A.dtype)
    right = -torch.linalg.solve(BB, G_A) @ A.T / s**2
    # The inverted matrix maps X, flattened by rows, to BB X + X AA.
    X = torch.linalg.inv(torch.kron(BB, eye) + torch.kron(eye, AA)) @ right.reshape(-1)
    X = X.reshape(len(A), len(A))
    projector = torch.eye(len(B), dtype=A.dtype) - B @ torch.linalg.solve(BB, B.T)
    g_A = torch.linalg.solve(BB, G_A) / s**2 + X @ A
    g_B = projector @ G_B @ torch.linalg.inv(AA) / s**2 - B @ X
    return g_A, g_B, X


def pair(scale=0.7):
    model = build(1, rasa_ext.RasaConfig(rank=3, k=0))
    with torch.no_grad():
        model[0].d.fill_(scale)
    return model


def test_the_published_formulas():
    model, s = pair(), 0.7
    set_gradients(model, draw(model))
    G_A, G_B = (model[0].get_parameter(name).grad.clone() for name in "AB")
    A, B = model[0].A.detach(), model[0].B.detach()
    g_A, g_B, X = paper(A, B, G_A, G_B, s)
    LoraPro(model, torch.optim.SGD, lr=0.0, **EXACT).step()
    torch.testing.assert_close(model[0].A.grad, g_A, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model[0].B.grad, g_B, rtol=1e-9, atol=1e-10)
    # The X that follows from these gradients solves the paper's Sylvester equation.
    ours = (model[0].A.grad - torch.linalg.solve(B.T @ B, G_A) / s**2) @ torch.linalg.pinv(A)
    left = B.T @ B @ ours + ours @ A @ A.T
    right = -torch.linalg.solve(B.T @ B, G_A) @ A.T / s**2
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours, X, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", ["a pair", "pairs of several ranks", "a pool"])
def test_the_norm_is_the_least(case):
    """No step goes along the null space, where private ranks mix and no weight changes."""
    model = build(*CASES[case])
    solved(model, draw(model))
    for layer in model:
        own = len(layer.A)
        D = torch.diag(layer.d.detach()[:own])
        left = layer.A.grad @ (D @ layer.A).T
        right = (layer.B @ D).T @ layer.B.grad
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-9)


def gathered(case):
    """Return the inputs of the solvers (ranks, gradient, trained) and the weight gradient."""
    model = build(*CASES[case])
    gradient = draw(model)
    set_gradients(model, gradient)
    (group,) = find_groups(model)
    problem = group.problem({id(p) for p in model.parameters()})
    return problem.ranks, problem.gradient, problem.trained, gradient


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("case", ["a pair", "pairs without d"])
def test_conjugate_gradients_come_to_the_closed_form(case, ridge):
    model = build(*CASES[case])
    set_gradients(model, draw(model))
    for group in find_groups(model):
        problem = group.problem({id(p) for p in model.parameters()})
        parts = problem.ranks, problem.gradient, problem.trained
        closed = least_norm.pair_steps(*parts, ridge)
        limit = least_norm.pool_steps(*parts, ridge, 1000, 1e-14)
        torch.testing.assert_close(closed, limit, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ["a pair", "a pool", "nothing but a pool"])
def test_a_descent_direction_at_every_cut(case):
    ranks, G, trained, gradient = gathered(case)
    distances = [gradient.norm()]
    for count in range(1, 25):
        z = least_norm.pool_steps(ranks, G, trained, 0.0, count, 0.0)
        Jz = torch.stack([ranks.change(i, z) for i in range(ranks.layers)])
        distances.append((Jz - gradient).norm())
        assert z.dot(G) > 0
        if count == 1:  # one iteration only scales the raw gradient
            torch.testing.assert_close(z / z.norm(), G / G.norm())
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(distances))
    assert distances[-1] < distances[0]


def test_the_iterations_end_at_the_tolerance(monkeypatch):
    ranks, G, trained, _ = gathered("a pool")
    calls = []
    normal = ranks.normal
    monkeypatch.setattr(ranks, "normal", lambda *a: calls.append(a) or normal(*a))
    z = least_norm.pool_steps(ranks, G, trained, 0.0, 1000, 1e-2)
    assert (normal(z, ranks.grams()) - G).norm() <= 1e-2 * G.norm()
    assert 3 < len(calls) < 100
    fewer = least_norm.pool_steps(ranks, G, trained, 0.0, len(calls) - 1, 0.0)
    assert (normal(fewer, ranks.grams()) - G).norm() > 1e-2 * G.norm()


@pytest.mark.parametrize("case", ["a pair", "a pool"])
def test_the_change_of_weights_knows_no_gauge(case):
    """B C and C^-1 A are the same adapter, so J z is the same change of the weights."""
    model = build(*CASES[case])
    with torch.no_grad():  # if a layer's private ranks have one scale, any C preserves dW
        for layer in model:
            layer.d[: len(layer.A)] = 0.8
    gradient = draw(model)
    before = jacobian(model) @ solved(model, gradient)
    weights = changes(model, parameters(model))
    with torch.no_grad():
        for layer in model:
            C = torch.randn(len(layer.A), len(layer.A), dtype=torch.float64)
            layer.A.copy_(torch.linalg.solve(C, layer.A))
            layer.B.copy_(layer.B @ C)
        if model[0].pool is not None:
            model[0].pool.A.mul_(3.0)
            model[0].pool.B.div_(3.0)
    torch.testing.assert_close(changes(model, parameters(model)), weights)
    after = jacobian(model) @ solved(model, gradient)
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_the_ridge_is_over_the_mean_of_the_diagonal(case):
    """(J^T J + rho) z = G, where rho is a share of the mean over ranks of J^T J's diagonal."""
    model, ridge = build(*CASES[case]), 0.05
    G = set_gradients(model, draw(model))
    J, rho = jacobian(model), torch.zeros(0, dtype=torch.float64)
    names = list(parameters(model))
    squares = unflat(J.square().sum(0), model)
    # All elements of a rank in one factor have equal squares, so one of them is enough.
    ranks = {
        name: value[:, 0] if name.endswith("A") else value[0] for name, value in squares.items()
    }
    single = not any("pool" in name for name in names)
    for name, value in squares.items():
        key = name.rpartition(".")[0]
        mine = [ranks[f"{key}.A"], ranks[f"{key}.B"]] if single else list(ranks.values())
        rho = torch.cat((rho, (ridge * torch.cat(mine).mean()).repeat(value.numel())))
    LoraPro(model, torch.optim.SGD, lr=0.0, **{**EXACT, "ridge": ridge}).step()
    z = gradients(model)
    expected = torch.linalg.solve(J.T @ J + torch.diag(rho), G)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-10)


def test_ranks_that_are_one_another_s_multiples():
    """A pair with dependent ranks has a larger null space, and still z = J^+ g."""
    model = pair()
    with torch.no_grad():
        model[0].B[:, 1] = 2 * model[0].B[:, 0]
    gradient = draw(model)
    J = jacobian(model)
    z = solved(model, gradient, ridge=1e-10)
    expected = torch.linalg.pinv(J, rtol=1e-12) @ gradient.reshape(-1)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)


def test_a_pair_that_begins_at_zero():
    """With B = 0 and no ridge, A gets a zero gradient, and nothing is divided by zero."""
    model = pair()
    with torch.no_grad():
        model[0].B.zero_()
    gradient = draw(model)
    J = jacobian(model)
    z = solved(model, gradient)
    assert not model[0].A.grad.any()
    torch.testing.assert_close(z, torch.linalg.pinv(J) @ gradient.reshape(-1))
