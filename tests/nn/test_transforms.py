"""Second derivatives, torch.func's transforms and traced models, against plain PyTorch."""

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import adapted_layers, adapter_of, randomize
from tests.helpers.oracle import differentiable_delta

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
EACH = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def by_patch(base, **options):
    return rasa_ext.patch_model(base, rank=3, k=1, **options)


def by_peft(base, dropout=0.0):
    config = RasaConfig(r=3, rasa_k=1, target_modules="all-linear", rasa_dropout=dropout)
    return peft.get_peft_model(base, config)


FRONTS = pytest.mark.parametrize("front", [by_patch, by_peft])


def drawn(front, **options):
    torch.manual_seed(0)
    model = front(Net(), **options)
    randomize(model, 1)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    return lambda values, x: functional_call(model, values, (x,)).square().sum()


def plain_loss(model):
    """Return the loss as a function of the parameters by name, by plain operations in float64."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers = [
        (layer.base_layer.weight.double(), layer.base_layer.bias.double(), adapter_of(layer))
        for layer in adapted_layers(model).values()
    ]

    def loss(values, x):
        for weight, bias, adapter in layers:
            own = adapter.map(lambda t: values[names[id(t)]])
            x = torch.tanh(x @ (weight + differentiable_delta(own)).T + bias)
        return x.square().sum()

    return loss


def wide(values):
    return {name: p.detach().double().requires_grad_() for name, p in values.items()}


def maml(loss, values, x):
    """Return the gradients of the loss after one step, through the step."""
    first = torch.autograd.grad(loss(values, x), list(values.values()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(values.items(), first, strict=True)}
    return torch.autograd.grad(loss(fast, x), list(values.values()))


@FRONTS
def test_a_gradient_through_a_gradient_step(front):
    model = drawn(front)
    found = maml(loss_of(model), trained(model), X)
    right = maml(plain_loss(model), wide(trained(model)), X.double())
    for mine, exact in zip(found, right, strict=True):
        assert (mine - exact).norm() <= 1e-4 * exact.norm()


@FRONTS
def test_a_hessian_product_of_the_parameters(front):
    model = drawn(front)

    def product(loss, values, x):
        given = list(values.values())
        first = torch.autograd.grad(loss(values, x), given, create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in first), given)

    found = product(loss_of(model), trained(model), X)
    right = product(plain_loss(model), wide(trained(model)), X.double())
    for mine, exact in zip(found, right, strict=True):
        assert (mine - exact).norm() <= 1e-4 * exact.norm()


@FRONTS
@pytest.mark.parametrize("why", ["dropout", "bfloat16"])
def test_a_second_derivative_is_refused_as_its_graph_is_made(why, front):
    model = drawn(front, **({"dropout": 0.5} if why == "dropout" else {}))
    x = X
    if why == "bfloat16":
        for layer in adapted_layers(model).values():
            layer.base_layer.bfloat16()
        x = X.bfloat16()
    loss = model(x).square().sum()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, list(trained(model).values()), create_graph=True)


@FRONTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_each_example(dtype, front):
    model = drawn(front)
    for layer in adapted_layers(model).values():
        layer.base_layer.to(dtype)
    values = {name: p.detach() for name, p in trained(model).items()}
    found = vmap(grad(loss_of(model)), in_dims=(None, 0))(values, EACH.to(dtype))
    for i, x in enumerate(EACH):
        right = grad(plain_loss(model))(wide(values), x.double())
        for name, exact in right.items():
            error = (found[name][i] - exact).norm() / exact.norm()
            assert error < (1e-4 if dtype is torch.float32 else 0.1)


@FRONTS
def test_an_ensemble_and_a_directional_derivative(front):
    model = drawn(front)
    values = {name: p.detach() for name, p in trained(model).items()}
    stacked = {name: torch.stack([p, 2 * p]) for name, p in values.items()}
    first, second = vmap(loss_of(model), in_dims=(0, None))(stacked, X)
    loss, right = plain_loss(model), {name: p.double() for name, p in values.items()}
    twice = {name: 2 * p for name, p in right.items()}
    torch.testing.assert_close(first.double(), loss(right, X.double()), rtol=1e-4, atol=0)
    torch.testing.assert_close(second.double(), loss(twice, X.double()), rtol=1e-4, atol=0)
    found = jvp(lambda given: loss_of(model)(given, X), (values,), (values,))
    exact = jvp(lambda given: loss(given, X.double()), (right,), (right,))
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=0)


@FRONTS
def test_dropout_differs_between_examples(front):
    model = drawn(front, dropout=0.5)
    values = {name: p.detach() for name, p in trained(model).items()}
    same = X[:1].expand(8, 8)
    run = vmap(lambda x: functional_call(model, values, (x,)), randomness="different")

    def spread() -> float:
        y = run(same)
        return (y - y[0]).abs().max().item()

    dropped = spread()
    model.eval()
    assert spread() < 1e-4 * dropped  # rows of one product may round differently


@FRONTS
def test_a_trace_with_grad(front):
    model = drawn(front)
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(EACH), model(EACH))
    assert all(p.grad is None for p in trained(model).values())
    traced(EACH).sum().backward()
    found = {name: p.grad for name, p in trained(model).items()}
    model.zero_grad()
    model(EACH).sum().backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(found[name], p.grad)


@FRONTS
def test_opacus_is_refused(front):
    model = drawn(front)
    for p in trained(model).values():
        p.grad_sample = None  # as Opacus marks parameters
    with pytest.raises(RuntimeError, match="Opacus"):
        model(X)
