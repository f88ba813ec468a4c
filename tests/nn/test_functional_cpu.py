"""On a CPU, by PyTorch's autograd alone: the oracle's values and gradients."""

from __future__ import annotations

import pytest
import torch

from rasa_ext import ops
from rasa_ext.nn import functional, functional_cpu
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


@pytest.mark.parametrize("form", ["linear", "add"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_derivatives(shape, form):
    x, weight, bias, factors = draw(shape)

    def run(x, *tensors):
        its = Factors(*tensors)
        if form == "add":
            return functional_cpu.adapted_linear(x, None, None, its, torch.tanh(x) @ weight.T)
        return functional_cpu.adapted_linear(x, weight, bias, its)

    assert torch.autograd.gradcheck(run, (x, *factors))
    assert torch.autograd.gradgradcheck(run, (x, *factors))


@pytest.mark.parametrize("missing", ["bias", "d", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_oracles_values(shape, missing):
    x, weight, bias, factors = draw(shape)
    bias = None if missing == "bias" else bias
    factors = factors._replace(d=None) if missing == "d" else factors
    expected = oracle.linear(x, weight, bias, Adapter(*factors))
    torch.testing.assert_close(functional_cpu.adapted_linear(x, weight, bias, factors), expected)
    y = torch.randn_like(expected)
    kept = y.clone()
    added = functional_cpu.adapted_linear(x, None, None, factors, y)
    torch.testing.assert_close(added, y + oracle.linear(x, 0 * weight, None, Adapter(*factors)))
    assert torch.equal(y, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_those_of_the_functions(dtype, params):
    x, weight, bias, factors = draw((5, 64, 48, 3, 6), dtype, params)
    found = []
    for module in (functional_cpu, functional):
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
        y = functional_cpu.adapted_linear(x, weight, bias, frozen)
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)
    y.sum().backward()
    assert frozen.B.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("meta", False)])
def test_which_torch_differentiates(device, expected):
    assert heuristics.torch_differentiates(torch.empty(3, 4, device=device)) == expected


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
