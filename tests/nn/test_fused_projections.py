"""Projections of one input are computed together, and always agree with the oracle."""

import copy
import functools
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.nn import functional
from rasa_ext.ops import heuristics
from tests.helpers.adapters import adapter_of, check_step, patched
from tests.helpers.models import BERT, GPT2, LLAMA, T5, VIT, ids
from tests.helpers.threads import run_in_threads

# The number of layers that each joint computation of a forward covers.
GROUPS = {
    "llama": [3, 2] * 3,
    "bert": [3] * 2,
    "t5": [3, 2] * 2 + [3, 2, 2] * 2,  # cross-attention: only k and v
    "vit": [3] * 2,
    "gpt2": [],
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(ops, "fuse_projections", lambda *_: True)


@pytest.fixture
def log(monkeypatch) -> list[int]:
    """The number of layers in each joint computation so far."""
    found, direct = [], functional.adapted_projections

    def counting(x, weights, *args):
        found.append(len(weights))
        return direct(x, weights, *args)

    monkeypatch.setattr(functional, "adapted_projections", counting)
    return found


def touch(model: nn.Module) -> None:
    """Write to every parameter like an optimizer's step, without changing a value."""
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.mul_(1)


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("entry", [LLAMA, BERT, T5, VIT, GPT2], ids=ids)
def test_training(entry, k, log):
    base = entry.build()
    model = patched(base, 4, k).train()
    for seed in range(3):
        log.clear()
        check_step(entry, base, model, seed=seed)
        if seed or entry is not T5:  # then cross-attention's q is separate
            assert sorted(log) == sorted(GROUPS[entry.name])
        touch(model)


class Pair(nn.Module):
    """Two layers of one input."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.gate_proj(x) + self.up_proj(x)


def pair(**options):
    """Return the model, both layers, and a function that computes a layer's output separately."""
    model = patched(nn.Sequential(Pair()), **options).train()

    def alone(layer, x):
        twin = copy.deepcopy(layer)
        twin.fused = None
        return twin(x)

    return model, model[0].gate_proj, model[0].up_proj, alone


@pytest.mark.parametrize("what", ["x", "A", "B", "d", "pool", "weight", "bias", "replaced"])
def test_what_is_written_to_in_between_is_read_again(what, log):
    _, a, b, alone = pair()
    x = torch.randn(3, 6)
    a(x)
    with torch.no_grad():
        if what == "replaced":
            b.d = nn.Parameter(b.d * 2)
        else:
            {"x": x, "pool": b.pool.A}.get(what, getattr(b, what, None)).mul_(2)
    torch.testing.assert_close(b(x), alone(b, x))
    assert log == ([2, 2] if what == "x" else [2])


@pytest.mark.parametrize("what", ["disabled", "merged", "hooked", "trained base", "no grad"])
def test_what_is_no_plain_layer_goes_alone(what, log):
    model, a, b, alone = pair()
    x = torch.randn(3, 6)
    if what == "disabled":
        b.disabled = True
    elif what == "merged":
        rasa_ext.merge(model.eval())
    elif what == "hooked":
        b.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    elif what == "trained base":
        b.base_layer.weight.requires_grad_(True)
    with torch.set_grad_enabled(what != "no grad"):
        torch.testing.assert_close(model(x), alone(a, x) + alone(b, x))
    assert not log


def test_dropout_is_one_mask_for_all(log):
    """Layers of equal values then give equal outputs, as they do not alone."""
    _, a, b, alone = pair(dropout=0.5)
    b.base_layer.load_state_dict(a.base_layer.state_dict())
    with torch.no_grad():
        for mine, other in zip(adapter_of(a), adapter_of(b), strict=True):
            other.copy_(mine)
    x = torch.randn(3, 6)
    torch.testing.assert_close(a(x), b(x))
    assert log == [2]
    assert not torch.allclose(alone(a, x), alone(b, x))


@pytest.mark.parametrize(
    ("device", "fused"), [("cpu", False), ("cuda", True), ("meta", False), ("mps", False)]
)
def test_where_projections_go_together(device, fused):
    """Only on a GPU, and only with more tokens than in decoding."""
    for shape in ((17, 8), (2, 9, 8), (17, 0)):
        x = SimpleNamespace(device=torch.device(device), shape=torch.Size(shape))
        assert heuristics.fuse_projections(x) == fused
    for shape in ((8,), (0, 8), (16, 8), (2, 8, 8)):
        x = SimpleNamespace(device=torch.device(device), shape=torch.Size(shape))
        assert not heuristics.fuse_projections(x)


def test_with_and_without_grad_do_not_mix():
    """Outputs computed with grad are not used without, or the reverse.

    With dropout, layers are computed together without grad, too.
    """
    _, a, b, _ = pair(dropout=0.5)
    x = torch.randn(3, 6)
    a(x)
    with torch.no_grad():
        assert b(x).grad_fn is None
        a(x)
    assert b(x).grad_fn is not None


def test_the_same_input_again_is_computed_again(log):
    model, a, b, _ = pair()
    x = torch.randn(3, 6)
    first, second = model(x), model(x)
    assert torch.equal(first, second)
    first.sum().backward()
    second.sum().backward()
    a(x), a(x), b(x)
    assert log == [2] * 4


def test_a_backward_in_between_leaves_the_next_layer_its_own(log):
    _, a, b, alone = pair()
    x = torch.randn(3, 6)
    for _ in range(2):
        a(x).sum().backward()
        y = b(x)
        y.sum().backward()
        torch.testing.assert_close(y, alone(b, x))


def test_an_input_that_begins_to_require_grad_gets_its_gradient():
    _, a, b, _ = pair()
    x = torch.randn(3, 6)
    a(x)
    x.requires_grad_()
    b(x).sum().backward()
    assert x.grad is not None


def test_outputs_may_be_modified_in_place():
    model, a, b, _ = pair()
    x = torch.randn(2, 3, 6)
    grads = []
    for in_place in (False, True):
        one, two = a(x), b(x)
        one, two = (one.mul_(2), two.relu_()) if in_place else (one * 2, two.relu())
        loss = one.square().sum() + two.square().sum()
        grads.append(torch.autograd.grad(loss, rasa_ext.adapter_parameters(model)))
    assert all(map(torch.equal, *grads))


def test_waiting_outputs_and_layers_are_not_kept_alive():
    model, a, b, _ = pair()
    a(torch.randn(3, 6))
    ((waiting, _),) = a.fused._inputs.current.waiting.values()
    gone = weakref.ref(waiting)
    del waiting
    a(torch.randn(3, 6))
    assert gone() is None
    model.train()
    assert a.fused._inputs.current is None
    a(torch.randn(3, 6))
    gone = weakref.ref(b)
    del b, model[0].up_proj
    gc.collect()
    assert gone() is None
    x = torch.randn(3, 6)
    assert a(x).grad_fn is not None


@pytest.mark.parametrize("entry", [LLAMA, BERT], ids=ids)
def test_dropout_under_inference_mode(entry):
    """Inference tensors have no version to recognize x by, so each layer computes separately."""
    model = patched(entry.build(), dropout=0.25).train()
    inputs = entry.inputs(0, torch.float32)
    with torch.inference_mode():
        torch.manual_seed(7)
        y = entry.loss(model, inputs)[0]
        torch.manual_seed(7)
        assert torch.equal(entry.loss(model, inputs)[0], y)
        assert not torch.equal(entry.loss(model, inputs)[0], y)
        created = patched(entry.build(), dropout=0.25).train()
        assert entry.loss(created, inputs)[0].isfinite().all()


def test_threads_that_train_on_one_x():
    """No thread uses an output that belongs to another thread's backward."""
    model = patched(LLAMA.build()).train()
    attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    x = torch.randn(5, attention.q_proj.in_features)

    def step(barrier: threading.Barrier, found: list, _: int) -> None:
        outputs = []
        for layer in layers:
            barrier.wait()
            outputs.append(layer(x))
        barrier.wait()
        sum(y.square().sum() for y in outputs).backward()
        found.append([y.detach() for y in outputs])

    expected = [layer(x).detach() for layer in layers]
    for _ in range(4):
        found: list = []
        barrier = threading.Barrier(2)
        run_in_threads(2, functools.partial(step, barrier, found))
        assert len(found) == 2
        for outputs in found:
            torch.testing.assert_close(outputs, expected)
