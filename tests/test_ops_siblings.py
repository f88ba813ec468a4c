"""The operators over layers that read one input: the single layer's, side by side."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from common import opcheck
from test_ops import (
    DTYPES,
    FIELDS,
    FLOOR,
    FOLDS,
    Errors,
    as_args,
    differentiable,
    excesses,
    make_adapter,
    places,
)

from rasa_ext import ops
from rasa_ext.nn import functional

NAMES = ("pack_projections", "linear_projections", "linear_projections_backward")
# (tokens, in, ((out, private ranks, pool ranks), ...)): grouped-query attention, no private ranks,
# no tokens, no pools, one sibling, ranks that differ.
SHAPES = (
    (5, 9, ((7, 3, 6), (2, 3, 6), (2, 3, 6))),
    (3, 17, ((4, 0, 5), (4, 0, 5))),
    (0, 6, ((4, 2, 4), (3, 2, 4))),
    (8, 16, ((24, 4, None), (8, 4, None))),
    (4, 5, ((3, 1, 2),)),
    (33, 65, ((31, 7, 32), (1, 1, 8))),
)


class Case:
    """Everything that one call needs."""

    def __init__(self, shape, dtype, device, bias=True, param=torch.float32):
        tokens, width, layers = shape

        def draw(*size):
            return torch.randn(*size, dtype=dtype, device=device)

        self.x = draw(tokens, width)
        self.adapters = [make_adapter(width, *layer, device, param) for layer in layers]
        self.weights = [draw(out, width) for out, _, _ in layers]
        # The last one never has a bias: an empty tensor stands for it.
        biases = [draw(out) for out, _, _ in layers[:-1]] + [draw(0)]
        self.biases = biases if bias else []
        self.grads = [draw(tokens, out) for out, _, _ in layers]

    def bias(self, i):
        return self.biases[i] if self.biases and self.biases[i].numel() else None

    def lists(self):
        """A, A_pool, B, B_pool, d, each a list over the layers, empty where nobody has one."""
        by_field = zip(*(as_args(adapter) for adapter in self.adapters), strict=True)
        return [[t for t in kind if t is not None] for kind in by_field]

    def packed(self, multiple=1, in_pack=True):
        """Ap, Bt, and the padded diagonals where they are left to the linear."""
        *factors, d = self.lists()
        Ap, Bt = ops.pack_projections(*factors, d if in_pack else [], self.x.dtype, multiple)
        pads = (
            torch.nn.functional.pad(v, (0, u.shape[1] - len(v))) for v, u in zip(d, Bt, strict=True)
        )
        return Ap, Bt, None if in_pack else torch.cat(list(pads))


def sample_calls(device, dtype=torch.float32):
    for shape, bias, folded in itertools.product(SHAPES, (True, False), FOLDS[device]):
        case, multiple = Case(shape, dtype, device, bias), 4 if bias else 1
        *factors, d = case.lists()
        yield "pack_projections", (*factors, d if folded else [], dtype, multiple)
        Ap, Bt, rest = case.packed(multiple, folded)
        yield "linear_projections", (case.x, case.weights, case.biases, Ap, Bt, rest)
        U = case.x @ Ap.T
        for need in itertools.product((True, False), repeat=2):
            args = (case.grads, case.x, case.weights, U, Ap, Bt, rest, *need)
            yield "linear_projections_backward", args


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    operator = getattr(torch.ops.rasa_ext, name).default
    calls = [args for called, args in sample_calls(device) if called == name]
    assert calls
    for args in calls:
        opcheck(operator, args)


@places
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_are_those_of_single_layers(shape, dtype, multiple, in_pack, device):
    case = Case(shape, dtype, device)
    Ap, Bt, _ = case.packed(multiple, in_pack)
    assert Ap.shape[0] == sum(up.shape[1] for up in Bt)
    rows = Ap.split([up.shape[1] for up in Bt])
    for adapter, down, up in zip(case.adapters, rows, Bt, strict=True):
        *factors, d = as_args(adapter)
        single = ops.pack(*factors, d if in_pack else None, dtype, multiple)
        assert torch.equal(down, single[0])
        assert torch.equal(up, single[1])


def single(case, multiple, in_pack):
    """The same by one layer's operators, in the dtype of what is given."""
    found = {"dx": 0}
    for i, (adapter, weight, grad) in enumerate(
        zip(case.adapters, case.weights, case.grads, strict=True)
    ):
        *factors, d = as_args(adapter)
        Ap, Bt = ops.pack(*factors, d if in_pack else None, case.x.dtype, multiple)
        rest = None if in_pack else torch.nn.functional.pad(d, (0, Ap.shape[0] - len(d)))
        y, U = ops.low_rank_linear(case.x, weight, case.bias(i), Ap, Bt, rest)
        dx, dAp, dBt, dd = ops.low_rank_linear_backward(
            grad, case.x, weight, U, Ap, Bt, rest, True, True
        )
        found["dx"] = found["dx"] + dx
        found |= {f"y{i}": y, f"U{i}": U, f"dAp{i}": dAp, f"dBt{i}": dBt, f"dd{i}": dd}
    return found


def together(case, multiple, in_pack):
    Ap, Bt, rest = case.packed(multiple, in_pack)
    y, U = ops.linear_projections(case.x, case.weights, case.biases, Ap, Bt, rest)
    dx, dAp, dBt, dd = ops.linear_projections_backward(
        case.grads, case.x, case.weights, U, Ap, Bt, rest, True, True
    )
    widths = [up.shape[1] for up in Bt]
    found = {"dx": dx}
    for i, parts in enumerate(zip(y, U.split(widths, 1), dAp.split(widths), dBt, strict=True)):
        found |= dict(zip((f"y{i}", f"U{i}", f"dAp{i}", f"dBt{i}"), parts, strict=True))
    parts = [dd] * len(widths) if in_pack else dd.split(widths)
    return found | {f"dd{i}": part for i, part in enumerate(parts)}


@places
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_as_one_by_one(shape, bias, multiple, in_pack, device):
    case = Case(shape, torch.float64, device, bias, torch.float64)
    expected = single(case, multiple, in_pack)
    found = together(case, multiple, in_pack)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@places
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]], ids=str)
def test_precision(shape, dtype, in_pack, device):
    """Against float64 over the same packs, within twice the error of the single operators."""
    ours, theirs = Errors(), Errors()
    for _ in range(32):
        case = Case(shape, dtype, device)
        wide = exact(case, in_pack)
        ours.add(together(case, 1, in_pack), wide)
        theirs.add(single(case, 1, in_pack), wide)
    assert not excesses(ours, theirs, FLOOR.get(dtype, torch.finfo(dtype).eps))[0]


def exact(case, in_pack):
    """In float64 from the packs in the case's dtype; saved U are rounded to that dtype."""
    Ap, Bt, rest = case.packed(1, in_pack)
    widths = [up.shape[1] for up in Bt]
    x, total = case.x.double(), 0
    found = {}
    scales = (
        [torch.ones(w, device=x.device) for w in widths] if rest is None else rest.split(widths)
    )
    for i, (down, up, scale) in enumerate(zip(Ap.split(widths), Bt, scales, strict=True)):
        grad, down, up = case.grads[i].double(), down.double(), up.double()
        scale = scale.to(case.x.dtype).double()
        U, H = x @ down.T, grad @ up
        bias = case.bias(i)
        y = x @ case.weights[i].double().T + (U * scale) @ up.T
        total = total + grad @ case.weights[i].double() + (H * scale) @ down
        found |= {f"y{i}": y if bias is None else y + bias.double(), f"U{i}": U}
        found |= {f"dAp{i}": (H * scale).T @ x, f"dBt{i}": grad.T @ (U * scale)}
        found[f"dd{i}"] = x.new_empty(0) if rest is None else (U * H).sum(0)
    return found | {"dx": total}


@places
@pytest.mark.parametrize(("need_x", "need_adapter"), [*itertools.product((True, False), repeat=2)])
def test_only_what_is_needed_comes_back(need_x, need_adapter, in_pack, device):
    case = Case(SHAPES[0], torch.float32, device)
    Ap, Bt, rest = case.packed(1, in_pack)
    dx, dAp, dBt, dd = torch.ops.rasa_ext.linear_projections_backward(
        case.grads, case.x, case.weights, case.x @ Ap.T, Ap, Bt, rest, need_x, need_adapter
    )
    assert bool(dx.numel()) == need_x
    assert bool(dAp.numel()) == bool(dBt) == need_adapter
    assert bool(dd.numel()) == (need_adapter and not in_pack)


def call(case, multiple=1):
    biases = [case.bias(i) for i in range(len(case.weights))]
    adapters = [as_args(adapter) for adapter in case.adapters]
    return functional.adapted_projections(case.x, case.weights, biases, adapters, multiple)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_gradients(shape, multiple, device):
    """Of every layer's sum, against the oracle, with one output that nobody used."""
    case = Case(shape, torch.float64, device, True, torch.float64)
    adapters = [differentiable(adapter) for adapter in case.adapters]
    case.x.requires_grad_()
    outputs = call(case, multiple)
    used = outputs[:-1] if len(outputs) > 1 else outputs
    sum((y * g).sum() for y, g in zip(used, case.grads, strict=False)).backward()
    total = 0
    for i, adapter in enumerate(adapters):
        weight, grad = case.weights[i], case.grads[i] * (i < len(used))
        torch.testing.assert_close(
            outputs[i].detach(), oracle.linear(case.x.detach(), weight, case.bias(i), adapter)
        )
        expected = oracle.linear_grads(grad, case.x.detach(), weight, adapter)
        total = total + expected.pop("x")
        for field, value in expected.items():
            if (tensor := getattr(adapter, field)) is not None:
                torch.testing.assert_close(tensor.grad, value, msg=f"{i}.{field}")
    torch.testing.assert_close(case.x.grad, total)


def test_gradcheck(device):
    case = Case(SHAPES[0], torch.float64, device, True, torch.float64)
    adapters = [as_args(differentiable(adapter)) for adapter in case.adapters]
    biases = [case.bias(i) for i in range(3)]

    def run(x, *tensors):
        n = len(FIELDS)
        split = [tensors[i * n : (i + 1) * n] for i in range(3)]
        return functional.adapted_projections(x.view(1, *x.shape), case.weights, biases, split)

    flat = [t for adapter in adapters for t in adapter]
    assert torch.autograd.gradcheck(run, (case.x.requires_grad_(), *flat))


@pytest.mark.parametrize("frozen", ["x", *FIELDS])
def test_each_input_may_be_frozen(frozen, device):
    case = Case(SHAPES[0], torch.float64, device, True, torch.float64)
    adapters = [differentiable(adapter) for adapter in case.adapters]
    case.x.requires_grad_(frozen != "x")
    if frozen != "x":
        getattr(adapters[1], frozen).requires_grad_(False)
    sum(y.sum() for y in call(case)).backward()
    assert (case.x.grad is None) == (frozen == "x")
    for i, adapter in enumerate(adapters):
        for field in FIELDS:
            assert (getattr(adapter, field).grad is None) == (i == 1 and field == frozen)
