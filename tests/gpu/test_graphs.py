"""CUDA graphs replayed with other inputs and weights; on a CPU, recorded operations run again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.nn import functional
from tests.helpers.adapters import patched, randomize
from tests.helpers.cuda import Captured, assert_close
from tests.helpers.models import LLAMA
from tests.helpers.operators import P, draw_group, lists
from tests.helpers.refusals import Snapshot

pytestmark = pytest.mark.usefixtures("streams")

DTYPES = [torch.float32, torch.bfloat16]
WIDTH, LAYERS = 64, 4


def model_of(dtype: torch.dtype, device: str) -> nn.Module:
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    return patched(base.to(device, dtype))


def forward(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    parameters = rasa_ext.adapter_parameters(model)
    return [y, *torch.autograd.grad(y.float().square().mean(), [x, *parameters])]


def draw(x: Tensor) -> None:
    with torch.no_grad():
        x.copy_(torch.randn_like(x))


@pytest.mark.parametrize("tokens", [1, 16, 17, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_sees_new_weights(dtype, tokens, device):
    """A captured forward reads new weights, although packs were cached before the capture.

    Up to 16 tokens use the hand-written pair of kernels.
    """
    model = model_of(dtype, device).eval()
    x = torch.randn(tokens, WIDTH, device=device, dtype=dtype)
    forward(model, x)
    graph = Captured(lambda: forward(model, x))
    assert_close(graph.replay(), forward(copy.deepcopy(model), x))
    for seed in (7, 8):
        draw(x)
        randomize(model, seed)
        assert_close(graph.replay(), forward(copy.deepcopy(model), x))
    step(model, x.detach().clone().requires_grad_())
    assert_close(graph.replay(), forward(copy.deepcopy(model), x))


# The tables of 60 layers do not fit in one kernel's parameters.
@pytest.mark.parametrize("layers", [1, LAYERS, 60])
def test_operators_over_a_group(layers, device):
    A, A_pool, B, B_pool, d = lists(draw_group(layers, 40, 24, 3, 6, device=device))
    weights = [torch.randn(24, 40, device=device) for _ in A]

    def run():
        Ap, Bp = ops.pack_group(A, A_pool, B, B_pool, d, torch.float32, 16)
        grads = ops.pack_group_backward(list(2 * Ap), list(3 * Bp), B, B_pool, d)
        merged = [weight.clone() for weight in weights]
        ops.merge_group(merged, Ap, Bp)
        halves = [weight.bfloat16() for weight in weights]
        ops.merge_group(halves, Ap, Bp)
        return [Ap, Bp, *grads, ops.delta_group(Ap, Bp), *merged, *halves]

    graph = Captured(run)
    for _ in range(2):
        for tensor in (*A, *B, *d, *weights, A_pool, B_pool):
            draw(tensor)
        assert_close(graph.replay(), run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_on_given_inputs(dtype, device):
    model = model_of(dtype, device)
    parameters = rasa_ext.adapter_parameters(model)
    pool = model[0].pool
    x = torch.randn(LAYERS, 64, WIDTH, device=device, dtype=dtype, requires_grad=True)

    def run():
        lists = ([getattr(layer, name) for layer in model] for name in ("weight", "bias"))
        A, B, d = ([getattr(layer, name) for layer in model] for name in ("A", "B", "d"))
        y = functional.adapted_group(x, *lists, A, pool.A, B, pool.B, d)
        return [y, *torch.autograd.grad(y.float().square().mean(), [x, *parameters])]

    graph = Captured(run)
    for seed in (7, 8):
        draw(x)
        randomize(model, seed)
        assert_close(graph.replay(), run())


def test_merging_refuses_to_be_captured(device):
    model, x = model_of(torch.float32, device), torch.ones(3, device=device)
    before = Snapshot(model)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1  # an empty graph would cause a warning
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            rasa_ext.merge(model)
    before.assert_unchanged()
    largest = rasa_ext.merge(model)
    assert largest > 0


class Training:
    """A patched Llama, an optimizer, and the tensor from which a step reads tokens."""

    def __init__(self, dtype: torch.dtype, device: str, dropout: float) -> None:
        self.model = patched(LLAMA.build().to(device, dtype), dropout=dropout).train()
        self.tokens = LLAMA.inputs(0, device=device)["input_ids"]
        self.parameters = rasa_ext.adapter_parameters(self.model)
        self.optimizer = torch.optim.SGD(self.parameters, 0.05, momentum=0.9)

    def step(self) -> list[Tensor]:
        """Return logits and gradients, which depend on the parameters after earlier steps."""
        logits = LLAMA.call(self.model, input_ids=self.tokens)
        self.optimizer.zero_grad()
        logits.float().square().mean().backward()
        self.optimizer.step()
        return [logits, *(parameter.grad for parameter in self.parameters)]

    def become(self, other: Training) -> None:
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_train_as_steps_do(dtype, dropout, device, fused):
    """Replays with new tokens and masks train like eager steps."""
    captured, eager = (Training(dtype, device, dropout) for _ in range(2))
    graph = Captured(captured.step)
    eager.become(captured)
    for seed in range(1, 4):
        tokens = LLAMA.inputs(seed, device=device)["input_ids"]
        found = []
        for training, run in ((captured, graph.replay), (eager, eager.step)):
            training.tokens.copy_(tokens)
            torch.manual_seed(seed)
            found.append(run())
        # During a capture, transformers' attention uses a mask, and thus other kernels.
        assert_close(*found, dtype)
