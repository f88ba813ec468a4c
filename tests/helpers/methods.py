"""Every method over a small model, and the formula of each in plain PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext import methods

WIDTHS = (9, 7)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(*WIDTHS)
        self.down_proj = nn.Linear(*reversed(WIDTHS), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


def base(layers: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers))).to(dtype)


def plain(name: str, **options) -> nn.Module:
    config = methods.method_named(name)(adapter_dtype=torch.float64, **options)
    return rasa_ext.patch_model(base(), config=config)


class Case(NamedTuple):
    """A method over the small model, and the method's formula."""

    make: Callable[[], nn.Module]
    change: Callable[[rasa_ext.RasaLinear], Tensor]
    """A layer's dW (out, in) by the method's formula, differentiable in the layer's tensors."""
    begun: bool = True
    """Whether a newly patched model computes the same as the base."""
    all_trained: bool = True
    """Whether every parameter of the adapter is trained; a booster leaves layers out."""
    follows: bool = True
    """Whether the formula holds after a write to a tensor; not if it uses norms from before."""


def _pooled(layer: rasa_ext.RasaLinear) -> Tensor:
    t, pool = layer.own_tensors(), layer.pool_tensors()
    dW = (t["B"] * t["d"][: t["A"].shape[0]]) @ t["A"]
    return dW + (pool["B"] * t["d"][t["A"].shape[0] :]) @ pool["A"]


def _pair(power: float) -> Callable[[rasa_ext.RasaLinear], Tensor]:
    """Return the formula dW = alpha / r^power B A."""
    return lambda layer: layer.config.alpha / layer.config.rank**power * layer.B @ layer.A


WIDE = {"adapter_dtype": torch.float64}
CASES = {
    "rasa": Case(lambda: plain("rasa", rank=4, k=1), _pooled),
    "rasa, ranks": Case(
        lambda: plain("rasa", rank=4, k=1, rank_pattern={r"1\..*": 6, "up_proj": 3}), _pooled
    ),
    "lora": Case(lambda: plain("lora", rank=3), _pair(1)),
    "rslora": Case(lambda: plain("lora", rank=3, rslora=True), _pair(0.5)),
    "lora-fa": Case(lambda: plain("lora", rank=3, train_A=False), _pair(1)),
}
KNOWN = dict(CASES)
"""``CASES``, and cases that tests of other packages add."""


def case(name: str) -> nn.Module:
    """Return a patched model with a randomized adapter."""
    model = KNOWN[name].make()
    randomize(model, 7)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Randomize all adapter parameters, so that dW is about as large as W."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.4 * noise + 0.3 * (parameter.ndim == 1))


def rasa_linears(model: nn.Module) -> dict[str, rasa_ext.RasaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, rasa_ext.RasaLinear)}


def inputs(rows: int = 5, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTHS[0], generator=generator, dtype=torch.float64)


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Compute each layer's dW (out, in) by the method's formula, differentiable."""
    return {path: KNOWN[name].change(layer) for path, layer in rasa_linears(model).items()}


def plain_forward(model: nn.Module, deltas: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute the model's output with dense weights W + dW, block by block."""
    for i, block in enumerate(model):
        W = {
            name: getattr(block, name).base_layer.weight + deltas[f"{i}.{name}"]
            for name in ("up_proj", "down_proj")
        }
        x = x + torch.tanh(x @ W["up_proj"].t() + block.up_proj.bias) @ W["down_proj"].t()
    return x
