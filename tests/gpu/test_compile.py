"""torch.compile on the device; on a CPU with the backend that generates no code."""

import pytest
import torch
from torch import nn

import rasa_ext
from tests.gpu.steps import check_model
from tests.helpers.adapters import adapters, observe, patched
from tests.helpers.cuda import assert_close
from tests.helpers.models import SEQUENTIAL
from tests.helpers.operators import P


def compiled(model: nn.Module, device: str) -> nn.Module:
    """Compile as one graph. tests/nn/test_compile.py tests Inductor on a CPU."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_and_evaluation(dtype, device):
    base = SEQUENTIAL.build().to(device, dtype)
    model = patched(base).train()
    run = compiled(model, device)
    check_model(SEQUENTIAL, base, model, run)
    x = SEQUENTIAL.inputs(0, dtype, device)["x"]
    with torch.no_grad():
        assert_close([run(x)], [model(x)])


def test_dropout_of_torchs_generator(device):
    """Masks equal those of an eager step if Inductor is set to draw like torch."""
    base = SEQUENTIAL.build().to(device)
    model = patched(base, dropout=P).train()
    run = compiled(model, device)
    steps = []
    with torch._inductor.config.patch(fallback_random=True):
        for each in (model, run):
            torch.manual_seed(5)
            inputs = SEQUENTIAL.inputs(0, device=device)
            steps.append(observe(each, adapters(model), SEQUENTIAL, inputs))
    assert_close(list(steps[1].values()), list(steps[0].values()))


def test_dropout_of_inductors_generator(device):
    """Forward and backward use one mask: with W = 0 and dW = I, y and dx show it."""
    size, p = 64, 0.25
    model = rasa_ext.patch_model(nn.Sequential(nn.Linear(size, size)), size, 0, dropout=p)
    layer = model.to(device).train()[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        for parameter, value in ((layer.A, torch.eye(size)), (layer.B, torch.eye(size))):
            parameter.copy_(value)
        layer.d.fill_(1)
    run, masks = compiled(model, device), []
    x = torch.full((1000, size), 0.75, device=device, requires_grad=True)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = run(x)
        masks.append(y.detach() > 0.5)
        torch.testing.assert_close(y, masks[-1].float())
        (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 0.75))
        torch.testing.assert_close(dx, masks[-1].float())
        dropped, count = (~masks[-1]).sum().item(), masks[-1].numel()
        assert abs(dropped - count * p) <= 5 * (count * p * (1 - p)) ** 0.5
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
