"""A patched model over the compiled operators, as on a GPU, against the PyTorch kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rasa_ext
from rasa_ext import ops


class Blocks(nn.Module):
    """In each block two projections of one x, one without bias, one whose base is no plain GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(3):
            block = nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(9, 21),
                    "up_proj": nn.Linear(9, 21),
                    "down_proj": nn.Linear(21, 9, bias=False),
                }
            )
            block["hooked"] = nn.Linear(9, 9)
            block["hooked"].register_forward_hook(lambda module, args, output: output)
            self.layers.append(block)

    def forward(self, x):
        for block in self.layers:
            inner = torch.tanh(block["gate_proj"](x)) * block["up_proj"](x)
            x = x + block["hooked"](block["down_proj"](inner))
        return x


def patched(**options) -> nn.Module:
    torch.manual_seed(0)
    model = rasa_ext.patch_model(Blocks(), 4, 1, **options)
    for parameter in rasa_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def model() -> nn.Module:
    return patched()


@pytest.fixture(params=[False, True], ids=["alone", "fused"])
def fused(request) -> bool:
    return request.param


@pytest.fixture
def on_host(host, fused, monkeypatch):
    """The package's operators become the compiled ones, as on a GPU."""
    return lambda: host.take_over(monkeypatch, fused)


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {**found, "y": y.detach(), "x": x.grad}


@pytest.mark.parametrize("shape", [(9,), (4, 9), (3, 11, 9), (0, 9)], ids=str)
def test_training_step(model, on_host, host, shape, fused):
    x = torch.randn(shape)
    expected = step(copy.deepcopy(model), x)
    on_host()
    host.reset()
    found = step(model, x)
    # Fused, the ranks of two projections stand side by side in one U.
    assert any("m=32 " in call for call in host.calls()) == (fused and x.numel() > 0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=name)
    assert bool(host.calls()) == (x.numel() > 0)


@pytest.mark.parametrize("shape", [(3, 11, 9), (0, 9)], ids=str)
def test_training_step_with_dropout(on_host, host, fused, monkeypatch, shape):
    """Under the mask that the compiled operator draws from torch's seed, again and again."""
    model = patched(dropout=0.3)
    monkeypatch.setattr(ops, "dropout", host.ops.dropout)
    monkeypatch.setattr(ops, "noise_words", lambda *_: 2)
    monkeypatch.setattr(ops, "fuse_projections", lambda *_: fused)
    x = torch.randn(shape)
    steps = [copy.deepcopy(model).train() for _ in range(3)]
    torch.manual_seed(5)
    expected = step(steps[0], x)
    on_host()
    for again in steps[1:]:
        torch.manual_seed(5)
        for name, value in step(again, x).items():
            torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_without_grad(model, on_host, tokens):
    """Twice: the second time packs are cached."""
    x = torch.randn(tokens, 9)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        on_host()
        torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge(model, on_host, host, dtype):
    """Layers of a group in a batch, float32 ones where they lie; and autograd learns of it."""
    model.to(dtype).train()  # which gives the adapters their own dtype back
    expected = copy.deepcopy(model)
    largest = rasa_ext.merge(expected)
    y = model.layers[0]["gate_proj"](torch.randn(3, 9, dtype=dtype, requires_grad=True))
    on_host()
    host.reset()
    assert rasa_ext.merge(model) == pytest.approx(largest, rel=1e-5)
    merged = [call for call in host.calls() if "beta=1" in call]
    calls, layers = (12, 1) if dtype == torch.float32 else (4, 3)
    assert len(merged) == calls
    assert all(f"batch={layers} " in call for call in merged)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
