"""On a CPU, by PyTorch's autograd alone: the oracle's values and gradients."""

from __future__ import annotations

import pytest
import torch

from rasa_ext import ops
from rasa_ext.nn import composed, functional
from rasa_ext.ops import Factors, heuristics
from tests.helpers import oracle
from tests.helpers.adapters import adapted_layers, patched
from tests.helpers.models import LLAMA
from tests.helpers.operators import SHAPES, draw_adapter
from tests.helpers.oracle import Adapter


def draw(shape, dtype=torch.float64, params=torch.float64):
    """x (1, M, in), weight, bias and trainable factors."""
    M, width, out, own, pooled = shape
    x, weight, bias = (
        torch.randn(size, dtype=dtype) for size in ((1, M, width), (out, width), out)
    )
    adapter = draw_adapter(width, out, own, pooled, dtype=params)
    return x.requires_grad_(), weight, bias, Factors(*adapter.map(lambda t: t.requires_grad_()))


@pytest.fixture(
    params=[(True, True), (False, True), (False, False)],
    ids=["ranks first", "d on tokens", "d in pack"],
    autouse=True,
)
def way(request, monkeypatch) -> None:
    """Both orders of the down-projection, and both places of d, in every dtype."""
    for name, chosen in zip(("ranks_first", "d_on_tokens"), request.param, strict=True):
        monkeypatch.setattr(composed, name, lambda rows, its=chosen: its)


@pytest.mark.parametrize("form", ["linear", "add", "projections"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_derivatives(shape, form):
    x, weight, bias, factors = draw(shape)

    def run(x, *tensors):
        its = Factors(*tensors)
        if form == "add":
            return composed.adapted_add(torch.tanh(x) @ weight.T, x, its)
        if form == "linear":
            return composed.adapted_linear(x, weight, bias, its)
        return composed.adapted_projections(x, (weight, weight), (bias, None), (its, its))

    assert torch.autograd.gradcheck(run, (x, *factors))
    assert torch.autograd.gradgradcheck(run, (x, *factors))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_oracles_values(shape, bias):
    x, weight, b, factors = draw(shape)
    b = b if bias else None
    expected = oracle.linear(x, weight, b, Adapter(*factors))
    torch.testing.assert_close(composed.adapted_linear(x, weight, b, factors), expected)
    y = torch.randn_like(expected)
    kept = y.clone()
    added = composed.adapted_add(y, x, factors)
    torch.testing.assert_close(added, y + oracle.linear(x, 0 * weight, None, Adapter(*factors)))
    assert torch.equal(y, kept)
    other = draw_adapter(shape[1], 3, 2, shape[4], dtype=torch.float64)
    wide = torch.randn(3, shape[1], dtype=torch.float64)
    both = (weight, wide), (b, None), (factors, Factors(*other))
    first, second = composed.adapted_projections(x, *both)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, oracle.linear(x, wide, None, other))


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1)], ids=str)
def test_projections_without_a_diagonal(without):
    x, weight, bias, factors = draw((5, 9, 7, 3, 6))
    each = [factors._replace(d=None) if i in without else factors for i in range(2)]
    found = composed.adapted_projections(x, (weight, weight), (bias, bias), each)
    for y, its in zip(found, each, strict=True):
        torch.testing.assert_close(y, oracle.linear(x, weight, bias, Adapter(*its)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_those_of_the_functions(dtype, params):
    x, weight, bias, factors = draw((5, 64, 48, 3, 6), dtype, params)
    found = []
    for module in (composed, functional):
        y = module.adapted_linear(x, weight, bias, factors)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *factors))))
    for mine, theirs in zip(*found, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        )
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= 8 * max(torch.finfo(t).eps for t in (dtype, params))


def test_what_is_frozen_gets_no_gradient_and_a_frozen_A_keeps_no_x():
    x, weight, bias, factors = draw((5, 9, 7, 3, 6), torch.float32, torch.float32)
    x, frozen = x.detach(), factors._replace(A=factors.A.detach(), A_pool=factors.A_pool.detach())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = composed.adapted_linear(x, weight, bias, frozen)
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)
    y.sum().backward()
    assert frozen.B.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize(
    ("tokens", "dtype", "device", "expected"),
    [
        ((512,), torch.float32, "cpu", True),
        ((2, 256), torch.float32, "cpu", True),
        ((513,), torch.float32, "cpu", False),
        ((513,), torch.float64, "cpu", False),
        ((513,), torch.bfloat16, "cpu", True),
        ((1,), torch.bfloat16, "meta", False),
    ],
)
def test_which_torch_differentiates(tokens, dtype, device, expected):
    x = torch.empty(*tokens, 3, dtype=dtype, device=device)
    assert heuristics.torch_differentiates(x) == expected


@pytest.mark.parametrize("tokens", [512, 513])
def test_where_d_goes(tokens):
    assert heuristics.d_on_tokens(torch.empty(tokens, 3)) == (tokens == 512)


@pytest.mark.parametrize(
    ("tokens", "dtype", "first"),
    [(352, torch.float32, True), (353, torch.float32, False), (1, torch.bfloat16, False)],
)
def test_whose_ranks_come_first(tokens, dtype, first):
    assert heuristics.ranks_first(torch.empty(tokens, 3, dtype=dtype)) == first


def test_a_compiled_model_calls_the_operators():
    model = patched(LLAMA.build())
    layer, operators = adapted_layers(model)["model.layers.0.mlp.down_proj"], []

    def backend(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(3, layer.in_features)
    torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert ops.torch_differentiates(x)
    assert operators
    assert not any("addmm" in name for name in operators)


def test_a_second_derivative_of_a_function_is_refused():
    """By PyTorch's autograd it is right, as shown above."""
    model = patched(LLAMA.build())
    layer = adapted_layers(model)["model.layers.0.mlp.down_proj"]
    for tokens, refused in ((2, False), (600, True)):
        x = torch.randn(tokens, layer.in_features, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        if refused:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()
        else:
            grad.sum().backward()
            assert x.grad is not None
