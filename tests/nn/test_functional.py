"""The autograd functions: gradients, frozen inputs, and work and memory of the backward."""

import pytest
import torch
from torch import nn

from rasa_ext.nn import functional
from rasa_ext.nn.functional import Dropped
from rasa_ext.ops import Factors
from tests.helpers import oracle
from tests.helpers.adapters import PlainRasa
from tests.helpers.operators import SHAPES, P, draw_adapter, packed, random_mask
from tests.helpers.oracle import Adapter

FIELDS = Adapter._fields


def draw(shape, device, dtype=torch.float64, layers=1):
    """Draw x, and a list over layers each of weights, biases, adapters and output gradients."""
    M, width, out, own, pooled = shape

    def random(*size):
        return torch.randn(*size, dtype=dtype, device=device)

    drawn = [
        (random(out, width), random(out), draw_adapter(width, out, own, pooled, device, dtype))
        for _ in range(layers)
    ]
    return random(M, width), *map(list, zip(*drawn, strict=True)), [random(M, out)] * layers


def trainable(adapter: Adapter) -> Adapter:
    return adapter.map(lambda t: t.requires_grad_())


def linear(x, weight, bias, factors, dropped=functional.NO_DROPOUT, y=None) -> torch.Tensor:
    pack = packed(Factors(*factors), x.dtype)
    return functional.low_rank_linear(x, weight, bias, pack, dropped, y)


def projections(x, weights, biases, factors, dropped=functional.NO_DROPOUT):
    packs = [packed(Factors(*each), x.dtype) for each in factors]
    return functional.adapted_projections(x, weights, biases, packs, dropped)


def outputs(x, weights, biases, adapters) -> tuple[torch.Tensor, ...]:
    """Compute the outputs of one layer, or of several layers together."""
    if len(adapters) == 1:
        return (linear(x, weights[0], biases[0], adapters[0]),)
    return projections(x, weights, biases, adapters)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("form", ["linear", "add", "projections"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape, form, dropout, device):
    x, (weight, other), (bias, _), adapters, _ = draw(shape, device, layers=2)
    x = x[None].requires_grad_()
    first, second = map(trainable, adapters)
    mask = (random_mask(x), 1 / (1 - P)) if dropout else ()

    def run(*values):
        drop = Dropped(*mask) if dropout else functional.NO_DROPOUT
        if form == "add":
            return linear(values[0], None, None, values[1:6], drop, x @ weight.T)
        if form == "linear":
            return linear(values[0], weight, bias, values[1:6], drop)
        factors = values[1:6], values[6:]
        return projections(values[0], (weight, other), (bias, None), factors, drop)

    values = (x, *first, *(second if form == "projections" else ()))
    assert torch.autograd.gradcheck(run, values, fast_mode=shape[1] == 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_have_the_dtypes_of_the_parameters(dtype, stored, device):
    """Gradients of a pack are summed and scaled in float32, whatever the pack's dtype."""
    x, (weight,), (bias,), (adapter,), (grad,) = draw((64, 48, 40, 3, 6), device, dtype)
    x, adapter = x.requires_grad_(), trainable(adapter.map(lambda t: t.detach().to(stored)))
    y = linear(x, weight, bias, adapter)
    assert y.dtype == dtype
    found = torch.autograd.grad(y, (x, *adapter), grad)
    expected = oracle.linear_grads(grad, x.detach(), weight, adapter)
    base = nn.utils.skip_init(nn.Linear, 48, 40)
    base.weight, base.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    wide = trainable(adapter.map(lambda t: t.detach().float()))
    plain = PlainRasa(base, wide)(x.float())
    theirs = torch.autograd.grad(plain, (x, *wide), grad.float())
    for mine, other, name in zip(found, theirs, ("x", *FIELDS), strict=True):
        leaf = x if name == "x" else getattr(adapter, name)
        assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
        error, in_float32 = (
            (each.double() - expected[name]).norm() / expected[name].norm()
            for each in (mine, other)
        )
        assert error <= 4 * max(torch.finfo(each).eps for each in (dtype, stored)) + 4 * in_float32


@pytest.mark.parametrize("layers", [1, 2])
def test_an_output_that_nobody_used_counts_as_zero(layers, device):
    x, weights, biases, adapters, grads = draw(SHAPES[0], device, layers=3)
    y = outputs(x.requires_grad_(), weights, biases, list(map(trainable, adapters)))
    torch.autograd.backward(y[:layers], grads[:layers])
    parts = zip(adapters, weights, grads, strict=True)
    expected = [oracle.linear_grads(g, x.detach(), w, a) for a, w, g in parts]
    torch.testing.assert_close(x.grad, sum(each["x"] for each in expected[:layers]))
    for i, each in enumerate(adapters):
        torch.testing.assert_close(each.B.grad, expected[i]["B"] * (i < layers))
        torch.testing.assert_close(each.A.grad, expected[i]["A"] * (i < layers))


TOKENS, WIDTH, OUT, RANK = 64, 320, 480, 8


def products(profile: torch.autograd.profiler.profile) -> int:
    """Return the multiplications of all matrix products, also of those within operators."""
    count = 0
    for event in profile.function_events:
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (rows, inner), (_, columns) = [shape for shape in event.input_shapes if shape][-2:]
            count += rows * inner * columns
    return count


def step(frozen: str, layers: int, add: bool = False):
    """Return the multiplications of a backward, and whether x and U were saved for it."""
    x, weights, _, adapters, _ = draw((TOKENS, WIDTH, OUT, 4, 4), "cpu", torch.float32, layers)
    for each in adapters:
        trainable(each)
        for name in set(frozen.split()) - {"x"}:
            getattr(each, name).requires_grad_(False)
    saved = []
    x.requires_grad_("x" not in frozen.split())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if add:
            y = (linear(x, None, None, adapters[0], y=x @ weights[0].T),)
        else:
            y = outputs(x, weights, [None] * layers, adapters)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        torch.autograd.backward(y, [torch.ones_like(t) for t in y])
    is_x = any(t.data_ptr() == x.data_ptr() for t in saved)
    is_U = any(t.shape == (TOKENS, RANK * layers) for t in saved)
    return products(profile), is_x, is_U


@pytest.mark.parametrize("layers", [1, 3])
def test_only_what_is_needed_is_saved_and_computed(layers):
    """x is saved only for dAp, U only for dBp and dd; the frozen weight is used only for dx."""
    M, R = TOKENS, RANK * layers
    dBp = H = M * R * OUT
    dAp = dx_low = M * R * WIDTH
    dx_base = layers * M * WIDTH * OUT
    all_of_it = dBp + H + dAp + dx_low + dx_base
    assert step("", layers) == (all_of_it, True, True)
    assert step("x", layers) == (dBp + H + dAp, True, True)
    assert step("A A_pool", layers) == (all_of_it - dAp, False, True)
    assert step("B B_pool d", layers) == (all_of_it - dBp, True, False)
    assert step("x A A_pool", layers) == (dBp, False, True)
    assert step("x B B_pool d", layers) == (H + dAp, True, False)
    assert step(" ".join(FIELDS), layers) == (H + dx_low + dx_base, False, False)
    assert step("A", layers) == step("B", layers) == step("d", layers) == (all_of_it, True, True)


def test_over_a_base_that_is_no_plain_gemm_only_what_is_needed_is_saved():
    assert step("A A_pool", 1, add=True)[1:] == (False, True)
    assert step("B B_pool d", 1, add=True)[1:] == (True, False)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_second_derivative_is_right_or_refused(layers, device):
    """It is right where PyTorch differentiates the products, and refused as a graph is made."""
    x, weights, biases, adapters, _ = draw(SHAPES[0], device, layers=layers)
    factors = list(map(trainable, adapters))
    *_, y = outputs(x.requires_grad_(), weights, biases, factors)
    if layers == 2 or device != "cpu":
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(y.square().sum(), (x, factors[-1].A), create_graph=True)
        return
    leaves = [x, *(t for t in factors[0] if t is not None)]

    def second(y):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    right = x @ (weights[0] + oracle.differentiable_delta(factors[0])).T + biases[0]
    torch.testing.assert_close(second(y), second(right))
