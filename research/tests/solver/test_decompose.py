"""decompose against the paper's formulas with dense matrices, and in edge cases."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rasa_research import solver
from rasa_research.solver import low_rank as lowrank
from rasa_research.solver.coordinate_descent import CoordinateDescent
from rasa_research.solver.low_rank import Matrix
from tests.helpers.adapters import LargestTensor
from tests.helpers.tiny_lm import make_model

NOISE = 1e-12
"""Tolerance of errors, which are float64 sums of squares with a total of one."""


def random_deltas(layers=4, out=20, width=28, inner=10, seed=0, noise=0.1) -> list[Tensor]:
    """Return matrices with falling spectra that share a part of their spaces."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scales = 0.8 ** torch.arange(inner)
    left, right = draw(out, inner), draw(inner, width)
    return [
        (left + draw(out, inner)) * scales @ (right + draw(inner, width)) + noise * draw(out, width)
        for _ in range(layers)
    ]


@pytest.fixture(scope="module")
def trained_deltas() -> dict[str, list[Tensor]]:
    """Weight changes of a tiny model by module type, after twenty steps on all weights."""
    model = make_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(160).view(4, 40) * 7 % 320
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    groups: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if "_proj" in name:
            groups.setdefault(name.split(".")[-2], []).append(p.detach() - before[name])
    assert len(groups) == 7
    return groups


class Plain:
    """The paper's coordinate descent in float64, with dense matrices and explicit inverses."""

    def __init__(self, targets, B, A, d, pool_B, pool_A):
        self.M, self.B, self.A, self.d = list(targets), list(B), list(A), d.clone()
        self.pool_B, self.pool_A = pool_B.clone(), pool_A.clone()

    @classmethod
    def from_theorem(cls, targets, r, k):
        parts = [torch.linalg.svd(M, full_matrices=False) for M in targets]
        own, d = r - k, torch.zeros(len(targets), len(targets) * k, dtype=torch.float64)
        for i, (_, S, _) in enumerate(parts):
            d[i, i * k : (i + 1) * k] = S[own:r]
        return cls(
            targets,
            [U[:, :own] * S[:own] for U, S, _ in parts],
            [V[:own] for _, _, V in parts],
            d,
            torch.cat([U[:, own:r] for U, _, _ in parts], 1),
            torch.cat([V[own:r] for _, _, V in parts]),
        )

    def deltas(self):
        return [
            B @ A + self.pool_B @ torch.diag(d) @ self.pool_A
            for B, A, d in zip(self.B, self.A, self.d, strict=True)
        ]

    def error(self):
        total = sum(M.square().sum() for M in self.M)
        rest = zip(self.M, self.deltas(), strict=True)
        return (sum((M - N).square().sum() for M, N in rest) / total).item()

    def rest(self):
        return [M - B @ A for M, B, A in zip(self.M, self.B, self.A, strict=True)]

    def update_private(self):
        own = self.A[0].shape[0]
        for i, M in enumerate(self.M):
            E = M - self.pool_B @ torch.diag(self.d[i]) @ self.pool_A
            U, S, V = torch.linalg.svd(E, full_matrices=False)
            self.B[i], self.A[i] = U[:, :own] * S[:own], V[:own]

    def update_pool_B(self):
        D = [torch.diag(d) for d in self.d]
        N = sum(Di @ self.pool_A @ self.pool_A.T @ Di for Di in D)
        rhs = sum(R @ self.pool_A.T @ Di for R, Di in zip(self.rest(), D, strict=True))
        self.pool_B = rhs @ torch.linalg.inv(N)

    def update_pool_A(self):
        D = [torch.diag(d) for d in self.d]
        N = sum(Di @ self.pool_B.T @ self.pool_B @ Di for Di in D)
        rhs = sum(Di @ self.pool_B.T @ R for R, Di in zip(self.rest(), D, strict=True))
        self.pool_A = torch.linalg.inv(N) @ rhs

    def update_d(self):
        H = (self.pool_B.T @ self.pool_B) * (self.pool_A @ self.pool_A.T)
        for i, R in enumerate(self.rest()):
            self.d[i] = torch.linalg.inv(H) @ torch.diagonal(self.pool_B.T @ R @ self.pool_A.T)


STEPS = ("update_private", "update_pool_B", "update_pool_A", "update_d")


def tail(targets, r):
    """Compute LoRA's minimum from the singular values."""
    total = sum(M.double().square().sum() for M in targets)
    left = sum(torch.linalg.svdvals(M.double())[r:].square().sum() for M in targets)
    return (left / total).item()


@pytest.mark.parametrize(
    ("layers", "out", "width", "r", "k"),
    [(4, 20, 28, 4, 1), (3, 28, 20, 5, 2), (2, 12, 12, 3, 3), (5, 9, 31, 2, 1), (3, 16, 16, 4, 0)],
)
def test_agrees_with_the_formulas_from_the_theorem(layers, out, width, r, k, figure):
    targets = random_deltas(layers, out, width)
    found = solver.decompose(targets, r, k, iterations=12)
    plain = Plain.from_theorem(targets, r, k)
    expected = [plain.error()]
    for _ in range(12):
        for step in STEPS if k else STEPS[:1]:
            getattr(plain, step)()
        expected.append(plain.error())
    assert len(found.errors) == 13
    difference = max(abs(a - b) for a, b in zip(found.errors, expected, strict=True))
    assert difference < 1e-8
    for i, delta in enumerate(plain.deltas()):
        torch.testing.assert_close(found.delta(i), delta, rtol=0, atol=1e-8 * delta.norm().item())
    assert found.lora_error == pytest.approx(tail(targets, r), abs=NOISE)
    figure(f"decompose L={layers} r={r} k={k} against the formulas: {difference:.1e}")


@pytest.mark.parametrize("exact", [lowrank.EXACT, 0], ids=["dense svd", "krylov"])
@pytest.mark.parametrize(("r", "k"), [(4, 1), (6, 3), (3, 3)])
def test_every_half_step_is_the_formula_and_lowers_the_error(r, k, exact, monkeypatch):
    monkeypatch.setattr(lowrank, "EXACT", exact)
    targets = random_deltas(4, 40, 52, inner=16)
    norm = sum(M.square().sum() for M in targets).sqrt()
    descent = CoordinateDescent([Matrix(M / norm) for M in targets], r - k, 4 * k)
    descent.start_at_random()
    plain = Plain(
        [M / norm for M in targets],
        descent.B,
        descent.A,
        descent.d,
        descent.pool_B,
        descent.pool_A,
    )
    error = descent.error()
    assert error == pytest.approx(plain.error(), abs=NOISE)
    for _ in range(8):
        for step in STEPS:
            getattr(descent, step)()
            getattr(plain, step)()
            now = descent.error()
            assert now == pytest.approx(plain.error(), abs=1e-8), step
            assert now <= error + NOISE, step
            error = now


@pytest.mark.parametrize("factors", [False, True])
def test_large_matrices_take_another_way_to_the_same_result(factors, monkeypatch):
    targets = random_deltas(3, 60, 44, inner=12, noise=0.3)
    if factors:
        targets = [(M[:, :20] @ M[:20, :20], M[:20]) for M in targets]
    dense = solver.decompose(targets, 6, 2, iterations=6)
    monkeypatch.setattr(lowrank, "EXACT", 0)
    krylov = solver.decompose(targets, 6, 2, iterations=6)
    assert krylov.lora_error == pytest.approx(dense.lora_error, abs=1e-8)
    assert krylov.errors == pytest.approx(dense.errors, abs=1e-8)
    falls = [b - a for a, b in pairwise(krylov.errors)]
    assert max(falls) <= NOISE


@pytest.mark.parametrize("exact", [lowrank.EXACT, 0], ids=["dense svd", "krylov"])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(
    ("layers", "out", "width", "r", "k"),
    [(4, 20, 28, 4, 1), (5, 20, 12, 5, 3), (6, 10, 9, 4, 4), (1, 9, 11, 3, 1), (3, 16, 16, 4, 0)],
)
def test_lora_with_as_many_numbers(layers, out, width, r, k, factors, exact, monkeypatch):
    """The error is the mean over all LoRAs that spend a budget evenly over the layers."""
    monkeypatch.setattr(lowrank, "EXACT", exact)
    targets = random_deltas(layers, out, width)
    given = [(M, torch.eye(width, dtype=M.dtype)) for M in targets] if factors else targets
    found = solver.decompose(given, r, k, iterations=0)
    lora = layers * r * (out + width)
    more = sum(d.numel() for d in found.d) / layers / (out + width) if k else 0
    low = r + int(more)
    expected = (1 - more % 1) * tail(targets, low) + (more % 1) * tail(targets, low + 1)
    assert found.lora_error_equal == pytest.approx(expected, abs=1e-8)
    assert (found.lora_error_equal < found.lora_error) == bool(k)
    tensors = [*found.A, *found.B, found.pool_A, found.pool_B, *found.d]
    numbers = sum(t.numel() for t in tensors) if k else lora
    assert numbers == pytest.approx(lora + layers * more * (out + width))


@pytest.mark.parametrize("r", [1, 4])
def test_never_worse_than_lora_and_monotone_on_random_deltas(r):
    targets = random_deltas(5)
    lora = tail(targets, r)
    best = []
    for k in range(r + 1):
        errors = solver.decompose(targets, r, k, iterations=20).errors
        assert errors[0] == pytest.approx(lora, abs=NOISE)
        assert all(b <= a + NOISE for a, b in pairwise(errors))
        best.append(errors[-1] / lora)
    assert best[0] == pytest.approx(1)
    assert max(best[1:]) < 0.99


def test_never_worse_than_lora_on_a_trained_models_deltas(trained_deltas, figure):
    for kind, targets in trained_deltas.items():
        lora = tail(targets, 4)
        ratios = []
        for k in range(5):
            found = solver.decompose(targets, 4, k, iterations=15)
            assert found.lora_error == pytest.approx(lora, abs=NOISE)
            errors = found.errors
            assert all(b <= a + NOISE for a, b in pairwise(errors))
            assert errors[-1] <= lora + NOISE
            ratios.append(errors[-1] / lora)
        assert ratios[1] < 1 - 1e-4
        figure(f"{kind} r=4, error/LoRA's for k=0..4: {' '.join(f'{x:.3f}' for x in ratios)}")


def test_factors_give_what_their_products_give():
    g = torch.Generator().manual_seed(1)
    pairs = [
        (torch.randn(24, s, generator=g), torch.randn(s, 30, generator=g)) for s in (6, 9, 4, 26)
    ]
    products = [B.double() @ A.double() for B, A in pairs]
    for k in (0, 1, 4):
        of_pairs = solver.decompose(pairs, 4, k, iterations=10)
        of_products = solver.decompose(products, 4, k, iterations=10)
        mixed = solver.decompose([*pairs[:2], *products[2:]], 4, k, iterations=10)
        assert of_pairs.lora_error == pytest.approx(of_products.lora_error, abs=NOISE)
        assert of_pairs.errors == pytest.approx(of_products.errors, abs=1e-8)
        assert of_pairs.errors == pytest.approx(mixed.errors, abs=1e-8)
        for i in range(4):
            torch.testing.assert_close(
                of_pairs.delta(i), of_products.delta(i), rtol=0, atol=1e-6 * products[i].norm()
            )


@pytest.mark.parametrize("s", [0, 1, 3])
def test_factors_of_less_than_the_rank(s):
    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(24, n, generator=g), torch.randn(n, 30, generator=g)) for n in (s, 9)]
    found = solver.decompose(pairs, 4, 2, iterations=10)
    assert found.lora_error == pytest.approx(tail([B @ A for B, A in pairs], 4), abs=1e-6)
    assert found.errors[-1] < found.lora_error
    assert all(b <= a + NOISE for a, b in pairwise(found.errors))


@pytest.mark.parametrize("init", ["svd", "random"])
def test_no_out_x_in_matrix_is_formed_from_factors(init):
    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(300, 5, generator=g), torch.randn(5, 400, generator=g)) for _ in range(3)]
    with LargestTensor() as seen:
        solver.decompose(pairs, 3, 1, iterations=2, init=init)
    assert 0 < seen.numel <= 400 * 2 * (3 + 8)


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("case", ["one layer", "rank two", "zeros", "one zero", "narrow", "scales"])
def test_edges(case, k, init):
    targets = {
        "one layer": random_deltas(1),
        "rank two": random_deltas(3, inner=2, noise=0),
        "zeros": [torch.zeros(6, 5)] * 3,
        "one zero": [*random_deltas(2), torch.zeros(20, 28)],
        "narrow": random_deltas(3, 2, 28),
        "scales": [M * s for M, s in zip(random_deltas(3), (1e-9, 1, 1e6), strict=True)],
    }[case]
    found = solver.decompose(targets, 3, k, iterations=15, init=init)
    layers, (out, width) = len(targets), targets[0].shape
    assert [tuple(t.shape) for t in found.A] == [(3 - k, width)] * layers
    assert [tuple(t.shape) for t in found.B] == [(out, 3 - k)] * layers
    assert [tuple(t.shape) for t in found.d] == [(3 - k + layers * k,)] * layers
    assert found.pool_A.shape == (layers * k, width)
    assert found.pool_B.shape == (out, layers * k)
    for tensor in (*found.A, *found.B, *found.d, found.pool_A, found.pool_B):
        assert tensor.dtype == torch.float64
        assert torch.isfinite(tensor).all()
    assert all((d[: 3 - k] == 1).all() for d in found.d)
    assert len(found.errors) == 16
    assert all(b <= a + NOISE for a, b in pairwise(found.errors))
    total = sum(M.double().square().sum() for M in targets)
    rest = sum((M.double() - found.delta(i)).square().sum() for i, M in enumerate(targets))
    if case == "zeros":
        assert found.errors == [0.0] * 16
        assert found.lora_error == 0
        assert rest == 0
        return
    assert found.errors[-1] == pytest.approx((rest / total).item(), abs=NOISE)
    assert found.lora_error == pytest.approx(tail(targets, 3), abs=NOISE)
    if init == "svd":
        assert found.errors[-1] <= found.lora_error + NOISE
    if case == "one layer" or k == 0:  # RaSA equals LoRA here
        assert found.errors[-1] == pytest.approx(found.lora_error, abs=0.05 if k else NOISE)
    if case in ("rank two", "narrow") and init == "svd":
        assert found.errors[-1] < NOISE


def test_normal_equations_of_unequal_scales_and_without_full_rank():
    g = torch.Generator().manual_seed(0)
    scales = torch.logspace(-9, 3, 6, dtype=torch.float64)
    X = torch.randn(20, 6, generator=g, dtype=torch.float64) * scales
    expected = torch.randn(6, 2, generator=g, dtype=torch.float64) / scales[:, None]
    N = X.T @ X
    torch.testing.assert_close(lowrank.solve_normal(N, N @ expected), expected)
    # Two equal columns get half each; a column of zeros gets zero.
    X = torch.stack([X[:, 0], X[:, 0], X[:, 1] * 0, X[:, 3]], 1)
    N = X.T @ X
    y = N @ torch.tensor([[1.0], [3.0], [5.0], [7.0]], dtype=torch.float64)
    half = torch.tensor([[2.0], [2.0], [0.0], [7.0]], dtype=torch.float64)
    torch.testing.assert_close(lowrank.solve_normal(N, y), half)


def test_slots_a_layer_leaves_free_serve_the_others():
    """If one layer needs no rank, its slots lower the other layer's error below LoRA's."""
    targets = [torch.zeros(20, 28), random_deltas(1)[0]]
    found = solver.decompose(targets, 4, 2, iterations=40)
    assert found.errors[-1] == pytest.approx(tail(targets[1:], 6), rel=0.02)
    assert found.lora_error == pytest.approx(tail(targets[1:], 4), abs=NOISE)


def test_pool_vectors_have_length_one():
    found = solver.decompose(random_deltas(3), 3, 2, iterations=3)
    one = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(found.pool_A.norm(dim=1), one)
    torch.testing.assert_close(found.pool_B.norm(dim=0), one)


def test_float32():
    targets = [M.float() for M in random_deltas(3)]
    single = solver.decompose(targets, 4, 1, iterations=10, dtype=torch.float32)
    double = solver.decompose(targets, 4, 1, iterations=10)
    assert single.pool_A.dtype == single.A[0].dtype == torch.float32
    assert single.errors == pytest.approx(double.errors, abs=1e-4)


def test_tolerance_progress_and_no_iterations():
    targets = random_deltas(3)
    seen = []
    full = solver.decompose(targets, 4, 1, progress=lambda *now: seen.append(now))
    assert len(full.errors) == 51
    assert seen == [(i, 50) for i in range(1, 51)]
    early = solver.decompose(targets, 4, 1, tol=1e-4)
    falls = [a - b for a, b in pairwise(early.errors)]
    assert falls[-1] <= 1e-4 < min(falls[:-1])
    assert early.errors == full.errors[: len(early.errors)]
    start = solver.decompose(targets, 4, 1, iterations=0)
    assert start.errors == full.errors[:1]


def test_a_random_start_is_drawn_from_the_global_generator():
    targets = random_deltas(3)

    def run(seed):
        torch.manual_seed(seed)
        return solver.decompose(targets, 4, 1, iterations=2, init="random").errors

    assert run(1) == run(1) != run(2)


GOOD = [torch.ones(3, 4)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"deltas": torch.ones(2, 3, 4)}, TypeError, "deltas: expected a sequence"),
        ({"deltas": []}, ValueError, "deltas: expected at least one"),
        ({"deltas": [torch.ones(3, 4), "x"]}, TypeError, r"deltas\[1\]: expected a tensor or"),
        ({"deltas": [torch.ones(3)]}, ValueError, r"deltas\[0\]: .* got \(3,\)"),
        ({"deltas": [torch.ones(0, 3)]}, ValueError, r"deltas\[0\]: .* without a size of zero"),
        ({"deltas": [(torch.ones(3, 2), torch.ones(3, 4))]}, ValueError, r"\(3, 2\) and \(3, 4\)"),
        ({"deltas": [(torch.ones(3, 2),) * 3]}, TypeError, r"deltas\[0\]: expected a tensor or"),
        ({"deltas": [*GOOD, torch.ones(4, 3)]}, ValueError, r"deltas\[2\]: .* got \(4, 3\)"),
        ({"deltas": [torch.ones(3, 4).int()]}, TypeError, r"deltas\[0\]: .* got torch.int32"),
        ({"deltas": [torch.full((3, 4), float("nan"))]}, ValueError, r"deltas\[0\]: .*finite"),
        ({"rank": 0}, ValueError, "rank: expected an integer >= 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank: expected an integer, got 2.0"),
        ({"k": 5}, ValueError, "k: expected 0 <= k <= rank"),
        ({"iterations": -1}, ValueError, "iterations: expected 0 or more, got -1"),
        ({"iterations": 1.5}, TypeError, "iterations: expected an integer, got 1.5"),
        ({"init": "zeros"}, ValueError, "init: expected 'svd' or 'random', got 'zeros'"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected torch.float64 or"),
        ({"tol": -1.0}, ValueError, "tol: expected a number, 0 or more, got -1.0"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        solver.decompose(**{"deltas": GOOD, "rank": 2, "k": 1, **arguments})
