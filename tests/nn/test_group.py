"""adapted_group: all layers of a group in one call."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rasa_ext import ops
from rasa_ext.nn import functional
from tests.helpers import oracle
from tests.helpers.adapters import Errors, PlainRasa, excesses
from tests.helpers.operators import DTYPES, draw_group, floor, lists
from tests.helpers.oracle import Adapter

POOL = ("A_pool", "B_pool")
# (layers, tokens, in, out, private ranks, pool ranks): odd sizes, one layer, no tokens, k = 0, and
# many tokens.
SHAPES = (
    (3, 5, 9, 7, 3, 6),
    (1, 3, 17, 2, 0, 5),
    (2, 0, 6, 4, 2, 4),
    (4, 8, 16, 24, 4, None),
    (2, 40, 33, 31, 7, 16),
)


class Case:
    """Inputs, weights and adapters of one group, with a shared pool."""

    def __init__(self, shape, dtype=torch.float64, device="cpu", bias=True, stored=None) -> None:
        layers, tokens, width, out, *ranks = shape
        stored = stored or (dtype if dtype == torch.float64 else torch.float32)

        def draw(*size):
            return torch.randn(*size, dtype=dtype, device=device)

        self.x, self.grad = draw(layers, tokens, width), draw(layers, tokens, out)
        self.weights = [draw(out, width) for _ in range(layers)]
        self.bias = [draw(out) for _ in range(layers)] if bias else None
        self.adapters = draw_group(layers, width, out, *ranks, device=device, dtype=stored)

    def args(self) -> tuple:
        return self.x, self.weights, self.bias, *lists(self.adapters)

    def leaves(self) -> dict[str, Tensor]:
        """Return x and every parameter, each once, by name."""
        found = {"x": self.x}
        for i, each in enumerate(self.adapters):
            fields = ("A", "B", "d") if i or each.A_pool is None else Adapter._fields
            found |= {f"{i}.{field}": getattr(each, field) for field in fields}
        for leaf in found.values():
            leaf.requires_grad_()
        return found

    def expected(self) -> dict[str, Tensor]:
        """Compute y and every gradient in float64, layer by layer."""
        found, ys, dx = {}, [], []
        for i, each in enumerate(self.adapters):
            x, weight = self.x[i].detach(), self.weights[i]
            ys.append(oracle.linear(x, weight, self.bias and self.bias[i], each))
            grads = oracle.linear_grads(self.grad[i], x, weight, each)
            dx.append(grads["x"])
            found |= {f"{i}.{field}": grads[field] for field in ("A", "B", "d")}
            if each.A_pool is not None:
                for field in POOL:
                    found[f"0.{field}"] = found.get(f"0.{field}", 0) + grads[field]
        return {**found, "x": torch.stack(dx), "y": torch.stack(ys)}

    def observed(self, run=functional.adapted_group) -> dict[str, Tensor]:
        leaves = self.leaves()
        y = run(*self.args())
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"y": y, **dict(zip(leaves, grads, strict=True))}

    def plain(self) -> dict[str, Tensor]:
        """Compute y and gradients by the official formula, layer by layer."""

        def run(x, weights, bias, *_):
            ys = []
            for i, each in enumerate(self.adapters):
                base = functools.partial(F.linear, weight=weights[i], bias=bias and bias[i])
                ys.append(PlainRasa(base, each)(x[i]))
            return torch.stack(ys)

        return self.observed(run)

    def check(self, found=None) -> None:
        found = self.observed() if found is None else found
        for name, value in self.expected().items():
            torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, device):
    """Errors from float64 are at most twice those of the official formula in the same dtype."""
    ours, theirs = Errors(by_kind=True), Errors(by_kind=True)
    for turn in range(8):  # pooled over draws, since one rounding error is random
        case = Case(shape, dtype, device, bias=bool(turn % 2))
        found, expected = case.observed(), case.expected()
        assert found["y"].dtype == found["x"].dtype == dtype
        ours.add(found, expected)
        theirs.add(case.plain(), expected)
    assert not excesses(ours, theirs, floor(dtype))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padding_changes_nothing(shape, device, monkeypatch):
    monkeypatch.setattr(ops, "rank_multiple", lambda *_: 16)
    Case(shape, device=device).check()


@pytest.mark.parametrize("place", ["x", "grad"])
def test_any_strides(place, device):
    """One matrix expanded to all layers, and interleaved layers. tests/ops has more layouts."""
    for layout in (
        lambda t: t[:1].expand_as(t),
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    ):
        case = Case(SHAPES[0], device=device)
        setattr(case, place, layout(getattr(case, place)))
        case.check()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64], ids=str)
def test_adapters_of_other_dtypes(stored, device):
    case = Case(SHAPES[0], torch.float32, device, stored=stored)
    found = case.observed()
    for name, value in case.expected().items():
        accuracy = 8 * max(torch.finfo(found[name].dtype).eps, torch.finfo(torch.float32).eps)
        assert (found[name].double() - value).norm() <= accuracy * value.norm(), name
        assert found[name].dtype == (torch.float32 if name in ("x", "y") else stored)


@pytest.mark.parametrize("frozen", ["x", *Adapter._fields])
def test_each_input_may_be_frozen(frozen, device):
    case = Case(SHAPES[0], device=device)
    leaves = case.leaves()
    still = [name for name in leaves if name.rpartition(".")[2] == frozen]
    for name in still:
        leaves[name].requires_grad_(False)
    functional.adapted_group(*case.args()).backward(case.grad)
    for name, value in case.expected().items():
        if name in still:
            assert leaves[name].grad is None
        elif name != "y":
            torch.testing.assert_close(leaves[name].grad, value, msg=name)


def test_equal_runs_give_equal_bits(device):
    """The pool's gradients are summed over layers in a fixed order."""
    case = Case((4, 33, 64, 48, 3, 32), torch.bfloat16, device)
    first, second = case.observed(), case.observed()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_compiles_as_one_graph(shape, device):
    torch._dynamo.reset()
    case = Case(shape, device=device)
    compiled = torch.compile(functional.adapted_group, fullgraph=True, backend="aot_eager")
    case.check(case.observed(compiled))


def test_a_second_derivative_is_refused(device):
    case = Case(SHAPES[0], device=device)
    case.leaves()
    y = functional.adapted_group(*case.args())
    (first,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[0], r"x: expected \(L, M, in\).*got shape \(5, 9\)"),
        (0, lambda x: x[:0], r"x: expected \(L, M, in\) for at least one layer.*\(0, 5, 9\)"),
        (1, lambda weights: weights[:2], r"weights: expected one tensor.*x's 3 layers, got 2"),
        (2, lambda bias: bias[:1], r"bias: expected one tensor.*got 1"),
        (3, lambda A: [*A, A[0]], r"A: expected one tensor.*got 4"),
        (7, lambda d: d[:2], r"d: expected one tensor.*got 2"),
    ],
)
def test_lists_of_other_lengths_are_refused(place, change, message):
    args = list(Case(SHAPES[0]).args())
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=message):
        functional.adapted_group(*args)
