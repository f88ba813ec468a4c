"""Low-rank linears of several layers on given inputs: the operators and ``adapted_layers``."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from common import Errors, excesses, opcheck
from oracle import Adapter
from plain import PlainRasa
from torch import Tensor, nn

from rasa_ext import functional_layers, ops
from rasa_ext.nn import functional

FIELDS = ("A", "A_pool", "B", "B_pool", "d")
POOL = ("A_pool", "B_pool")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6}
# (layers, tokens, in, out, private ranks, pool ranks): odd, one, none, k = 0, k = r, and with so
# many tokens that the pool is packed into every layer.
SHAPES = (
    (3, 5, 9, 7, 3, 6),
    (1, 3, 17, 2, 0, 5),
    (2, 0, 6, 4, 2, 4),
    (4, 8, 16, 24, 4, None),
    (2, 1, 1, 1, 1, 0),
    (2, 40, 33, 31, 7, 16),
    (1, 4, 5, 3, 1, 2),
)


class Case:
    """Inputs, weights and the adapters of one group, which share their pool."""

    def __init__(self, shape, dtype, device="cpu", bias=True, adapter_dtype=None) -> None:
        layers, tokens, width, out, own, pooled = shape
        stored = adapter_dtype or (dtype if dtype == torch.float64 else torch.float32)

        def draw(*size, dtype=dtype):
            return torch.randn(*size, dtype=dtype, device=device)

        self.x, self.grad = draw(layers, tokens, width), draw(layers, tokens, out)
        self.weights = [draw(out, width) for _ in range(layers)]
        self.bias = [draw(out) for _ in range(layers)] if bias else None
        down = up = None
        if pooled is not None:
            down, up = draw(pooled, width, dtype=stored), draw(out, pooled, dtype=stored)
        rank = own + (pooled or 0)
        self.adapters = [
            Adapter(
                draw(own, width, dtype=stored), down, draw(out, own, dtype=stored), up,
                draw(rank, dtype=stored),
            )
            for _ in range(layers)
        ]  # fmt: skip

    def lists(self) -> tuple:
        """A, A_pool, B, B_pool, d as the functions take them."""
        first = self.adapters[0]
        A, B, d = ([getattr(each, field) for each in self.adapters] for field in ("A", "B", "d"))
        return A, first.A_pool, B, first.B_pool, d

    def args(self) -> tuple:
        return self.x, self.weights, self.bias, *self.lists()

    def leaves(self) -> dict[str, Tensor]:
        """x and every parameter, each once, under its name."""
        found = {"x": self.x}
        for i, each in enumerate(self.adapters):
            found |= {f"{i}.{field}": getattr(each, field) for field in ("A", "B", "d")}
        first = self.adapters[0]
        if first.A_pool is not None:
            found |= {f"0.{field}": getattr(first, field) for field in POOL}
        return found

    def require_grad(self) -> Case:
        for leaf in self.leaves().values():
            leaf.requires_grad_()
        return self

    def expected(self) -> dict[str, Tensor]:
        """y and every gradient in float64, layer by layer."""
        found, ys = {}, []
        for i, each in enumerate(self.adapters):
            bias = None if self.bias is None else self.bias[i]
            x, weight = self.x[i].detach(), self.weights[i]
            ys.append(oracle.linear(x, weight, bias, each))
            grads = oracle.linear_grads(self.grad[i], x, weight, each)
            found.setdefault("x", []).append(grads["x"])
            found |= {f"{i}.{field}": grads[field] for field in ("A", "B", "d")}
            if each.A_pool is not None:
                for field in POOL:
                    found[f"0.{field}"] = found.get(f"0.{field}", 0) + grads[field]
        return {**found, "x": torch.stack(found["x"]), "y": torch.stack(ys)}

    def observed(self, run=functional.adapted_layers, multiple=1) -> dict[str, Tensor]:
        leaves = self.leaves()
        y = run(*self.args(), multiple)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"y": y, **dict(zip(leaves, grads, strict=True))}

    def plain(self) -> dict[str, Tensor]:
        """The official formula, one layer after the other."""

        def run(x, weights, bias, *_):
            ys = []
            for i, each in enumerate(self.adapters):
                base = nn.Linear(1, 1, bias=bias is not None)
                base.weight = nn.Parameter(weights[i], requires_grad=False)
                if bias is not None:
                    base.bias = nn.Parameter(bias[i], requires_grad=False)
                ys.append(PlainRasa(base, each)(x[i]))
            return torch.stack(ys)

        return self.observed(run)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, bias, device):
    """Against float64, within twice the error of the official formula at that dtype."""
    ours, theirs = Errors(by_kind=True), Errors(by_kind=True)
    for _ in range(8):  # pooled, since one rounding of a single number says little
        case = Case(shape, dtype, device, bias).require_grad()
        found, expected = case.observed(), case.expected()
        assert found["y"].dtype == found["x"].dtype == dtype
        ours.add(found, expected)
        theirs.add(case.plain(), expected)
    assert not excesses(ours, theirs, FLOOR.get(dtype, torch.finfo(dtype).eps))[0]


@pytest.mark.parametrize("in_packs", [True, False])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padding_and_the_place_of_the_pool_change_nothing(
    shape, multiple, in_packs, device, monkeypatch
):
    monkeypatch.setattr(ops, "pool_in_packs", lambda *_: in_packs)
    case = Case(shape, torch.float64, device).require_grad()
    found = case.observed(multiple=multiple)
    for name, value in case.expected().items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_few_tokens_leave_the_pool_alone():
    assert not ops.pool_in_packs(tokens=64, pooled=32)
    assert ops.pool_in_packs(tokens=65, pooled=32)


def expanded(t):
    return t[:1].expand_as(t)


def columns(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other(t):
    return torch.stack([t, t], -1)[..., 0]


def layers_last(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("layout", [expanded, columns, every_other, layers_last])
@pytest.mark.parametrize("place", ["x", "grad", "weights"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]], ids=str)
def test_strides(shape, place, layout, device):
    """One input for all layers, transposed weights, weights that lie differently."""
    case = Case(shape, torch.float64, device)
    if place == "weights":
        stacked = layout(torch.stack(case.weights))
        case.weights = [*stacked[:-1], stacked[-1].contiguous()]
    else:
        setattr(case, place, layout(getattr(case, place)))
    found, expected = case.require_grad().observed(), case.expected()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64], ids=str)
def test_adapters_of_other_dtypes(stored, device):
    case = Case(SHAPES[0], torch.float32, device, adapter_dtype=stored).require_grad()
    found = case.observed()
    for name, value in case.expected().items():
        accuracy = 8 * max(torch.finfo(found[name].dtype).eps, torch.finfo(torch.float32).eps)
        assert (found[name].double() - value).norm() <= accuracy * value.norm(), name
        assert found[name].dtype == (torch.float32 if name in ("x", "y") else stored)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape, device):
    case = Case(shape, torch.float64, device)
    case.x, case.weights = case.x[:, :2], case.weights
    leaves = case.require_grad().leaves()

    def run(*values):
        given = dict(zip(leaves, values, strict=True))
        pool = [given.get(f"0.{field}") for field in POOL]
        A, B, d = ([given[f"{i}.{f}"] for i in range(shape[0])] for f in ("A", "B", "d"))
        return functional.adapted_layers(
            given["x"], case.weights, case.bias, A, pool[0], B, pool[1], d
        )

    values = [leaf.detach().requires_grad_() for leaf in case.leaves().values()]
    assert torch.autograd.gradcheck(run, values, fast_mode=shape[2] > 20)


@pytest.mark.parametrize("frozen", ["x", *FIELDS])
def test_each_input_may_be_frozen(frozen, device):
    case = Case(SHAPES[0], torch.float64, device).require_grad()
    leaves = case.leaves()
    still = [name for name in leaves if name.rpartition(".")[2] == frozen]
    for name in still:
        leaves[name].requires_grad_(False)
    functional.adapted_layers(*case.args()).backward(case.grad)
    for name, value in case.expected().items():
        if name in still:
            assert leaves[name].grad is None
        elif name != "y":
            torch.testing.assert_close(leaves[name].grad, value, msg=name)


def test_equal_runs_give_equal_bits(device):
    """The pool's sums over layers have one order."""
    case = Case((4, 33, 64, 48, 3, 32), torch.bfloat16, device).require_grad()
    first, second = case.observed(), case.observed()
    assert all(torch.equal(first[name], second[name]) for name in first)


def sample_calls(device, dtype=torch.float32):
    """Arguments for both operators: every shape once, and what is needed in every combination."""
    for shape, bias in zip(SHAPES[:6], itertools.cycle((True, False))):
        case = Case(shape, dtype, device, bias)
        pack, pool = functional_layers._packed_layers(case.x, *case.lists(), 1 if bias else 4)
        stacked = None if case.bias is None else torch.stack(case.bias)
        yield "linear_group", (case.x, case.weights, stacked, *pack, *pool)
        _, U, V = ops.linear_group(case.x, case.weights, stacked, *pack, *pool)
        needs = list(itertools.product((True, False), repeat=2))
        for need in needs if shape is SHAPES[0] else needs[:1]:
            args = (case.grad, case.x, case.weights, U, V, *pack, *pool, *need)
            yield "linear_group_backward", args


@pytest.mark.parametrize("name", ["linear_group", "linear_group_backward"])
def test_opcheck(name, device):
    """Schema (nothing mutated, nothing aliased), fake kernel and compilation."""
    operator = getattr(torch.ops.rasa_ext, name).default
    for called, args in sample_calls(device):
        if called == name:
            opcheck(operator, args)
            pairs = zip(getattr(ops, name)(*args), operator(*args), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_compile(shape, device):
    torch._dynamo.reset()
    case = Case(shape, torch.float32, device).require_grad()
    compiled = torch.compile(functional.adapted_layers, fullgraph=True, backend="aot_eager")
    found, expected = case.observed(compiled), case.expected()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


def test_a_second_derivative_is_refused(device):
    case = Case(SHAPES[0], torch.float64, device).require_grad()
    y = functional.adapted_layers(*case.args())
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
def test_refusals(place, change, message):
    args = list(Case(SHAPES[0], torch.float32).args())
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=message):
        functional.adapted_layers(*args)
