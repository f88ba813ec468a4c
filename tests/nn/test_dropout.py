"""Dropout on the adapter's input, in single layers and in training of whole models."""

import pytest
import torch
from torch import Tensor, nn

from rasa_ext.nn import functional
from tests.helpers import oracle
from tests.helpers.adapters import adapter_of, adapters, assert_matches_oracle, observe, patched
from tests.helpers.models import CHECKPOINTED, SEQUENTIAL
from tests.helpers.operators import P, drop, unpacked


def drawn(seed: int, shape: tuple) -> Tensor:
    """Draw a dropout mask with ``seed``, as booleans."""
    torch.manual_seed(seed)
    mask, *_ = functional.dropout(torch.empty(shape), P)
    return unpacked(mask, torch.Size(shape))


def layer_of(dtype=torch.float64, hooked=False, **options):
    """Return a base layer (9, 7) and its adapted layer with dropout.

    A hook on the base prevents the path for plain linear layers.
    """
    stack = nn.Sequential(*(nn.Linear(9, 7) for _ in range(3))).to(dtype)
    if hooked:
        stack[1].register_forward_hook(lambda module, args, output: output)
    model = patched(stack, 4, 1, dropout=P, **options).train()
    return stack[1], model[1]


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9)], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_a_layer(needs_dx, hooked, shape):
    """Output and gradients equal the formula with the same mask; no_grad gives the same output."""
    base, layer = layer_of(hooked=hooked, adapter_dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_(needs_dx)
    kept = drawn(7, shape).view(-1, 9)
    torch.manual_seed(7)
    y = layer(x)
    flat = x.detach().view(-1, 9)
    dropped = drop(flat, kept)
    adapter, nothing = adapter_of(layer), torch.zeros_like(base.weight)
    expected = flat @ base.weight.T + base.bias + oracle.linear(dropped, nothing, None, adapter)
    torch.testing.assert_close(y.view(-1, 7), expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    G = grad.view(-1, 7)
    wanted = oracle.linear_grads(G, dropped, nothing, adapter)
    for field in ("A", "B", "d", "A_pool", "B_pool"):
        torch.testing.assert_close(getattr(adapter, field).grad, wanted[field], msg=field)
    if needs_dx:
        wanted_x = G @ base.weight + drop(wanted["x"], kept)
        torch.testing.assert_close(x.grad.view(-1, 9), wanted_x)
    with torch.no_grad():
        torch.manual_seed(7)
        torch.testing.assert_close(layer(x), y)


def step(model: nn.Module, entry, seed: int = 11, run=None) -> dict[str, Tensor]:
    """Return float64 logits and gradients of ``run``, or the model, under a seed."""
    inputs = entry.inputs(0, torch.float64)
    torch.manual_seed(seed)
    return observe(model if run is None else run, adapters(model), entry, inputs)


def assert_same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def with_dropout(base: nn.Module) -> nn.Module:
    return patched(base.double(), dropout=P, adapter_dtype=torch.float64).train()


def test_compile_with_checkpointing():
    torch._dynamo.reset()
    model = with_dropout(CHECKPOINTED.build())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = step(model, CHECKPOINTED)
    assert_same(step(model, CHECKPOINTED, run=compiled), expected)


def test_eval_is_without_dropout():
    base = SEQUENTIAL.build().double()
    model = with_dropout(base).eval()
    inputs = SEQUENTIAL.inputs(0, torch.float64)
    assert_matches_oracle(SEQUENTIAL, base, model, step(model, SEQUENTIAL), inputs)
