"""Dropout on the adapter's input, in single layers and in training of whole models."""

import pytest
import torch
from torch import Tensor, nn

from rasa_ext.nn import functional
from tests.helpers import oracle
from tests.helpers.adapters import adapter_of, adapters, observe, patched
from tests.helpers.models import CHECKPOINTED
from tests.helpers.operators import P, drop, unpacked


def drawn(seed: int, shape: tuple) -> Tensor:
    """Draw a dropout mask with ``seed``, as booleans."""
    torch.manual_seed(seed)
    mask, *_ = functional.dropout(torch.empty(shape), P)
    return unpacked(mask, torch.Size(shape))


def layer_of(bias: bool, hooked: bool, dropout: float):
    """Return a base layer (9, 7) and its adapted layer with dropout.

    A hook on the base prevents the path for plain linear layers.
    """
    stack = nn.Sequential(*(nn.Linear(9, 7, bias) for _ in range(3))).double()
    if hooked:
        stack[1].register_forward_hook(lambda module, args, output: output)
    model = patched(stack, 4, 1, dropout=dropout, adapter_dtype=torch.float64).train()
    return stack[1], model[1]


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (2, 1, 2, 9), (0, 9), (2, 0, 9)])
@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_a_layer(needs_dx, hooked, bias, dropout, shape):
    """Outputs and gradients are the formula's with the same mask, or none; also without grad."""
    base, layer = layer_of(bias, hooked, dropout)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_(needs_dx)
    kept = drawn(7, shape).view(-1, 9) if dropout else None
    torch.manual_seed(7)
    y = layer(x)
    flat = x.detach().view(-1, 9)
    dropped = drop(flat, kept)
    adapter, nothing = adapter_of(layer), torch.zeros_like(base.weight)
    alone = nn.functional.linear(flat, base.weight, base.bias)
    expected = alone + oracle.linear(dropped, nothing, None, adapter)
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
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(7)
            torch.testing.assert_close(layer(x), y)


def test_compile_with_checkpointing():
    """Logits and gradients are those of an eager step under the same seed."""
    torch._dynamo.reset()
    base, inputs = CHECKPOINTED.build().double(), CHECKPOINTED.inputs(0, torch.float64)
    model = patched(base, dropout=P, adapter_dtype=torch.float64).train()
    steps = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(11)
        steps.append(observe(run, adapters(model), CHECKPOINTED, inputs))
    torch.testing.assert_close(steps[1], steps[0])
