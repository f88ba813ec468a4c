"""What rasa_ext is measured against, written out so that it runs in the same process."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import rasa_ext
from rasa_ext.nn import fused_projections as siblings
from rasa_ext import ops


class OfficialLinear(nn.Module):
    """The formula of the published code: concatenate in every forward, leave the rest to autograd.

    Parameters are float32 and cast to the input's dtype, which is kinder to it than the published
    code's own habit of computing the adapter in float32.
    """

    def __init__(self, layer: rasa_ext.RasaLinear) -> None:
        super().__init__()
        self.base_layer, self.A, self.B, self.d = layer.base_layer, layer.A, layer.B, layer.d
        self.__dict__["pool"] = layer.pool

    def forward(self, x):
        result = self.base_layer(x)
        A = torch.cat([self.A, self.pool.A], 0).to(x.dtype)
        B = torch.cat([self.B, self.pool.B], 1).to(x.dtype)
        result += F.linear(F.linear(x, A) * self.d.to(x.dtype), B) * 1.0
        return result


def swap(model: nn.Module, make) -> nn.Module:
    """Replace every RasaLinear of a patched model by ``make(layer)``."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, rasa_ext.RasaLinear):
                parent._modules[key] = make(child)
    return model


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters, so that five variants fit one base."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextlib.contextmanager
def siblings_are(enabled: bool | None) -> Iterator[None]:
    """Within the context layers that read one input are computed together, or each alone."""
    before, siblings.ENABLED = siblings.ENABLED, enabled
    try:
        yield
    finally:
        siblings.ENABLED = before


class WithSiblings(nn.Module):
    """A model whose siblings are on or off, whatever the default is."""

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.model, self.enabled = model, enabled

    def forward(self, *args, **kwargs):
        with siblings_are(self.enabled):
            return self.model(*args, **kwargs)


def other_siblings(device: str) -> tuple[str, bool]:
    """The variant of ours in which siblings are not as they are by default: name and switch."""
    enabled = not ops.fuse_projections(torch.device(device).type)
    return f"ours, siblings {'on' if enabled else 'off'}", enabled


def meet_siblings(step: Callable[[], object], parameters: Iterable[nn.Parameter]) -> None:
    """Two steps with written parameters between them, from which siblings learn to go together."""
    for _ in range(2):
        with siblings_are(True):
            step()
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a patched model's B and d values as in training; zeros would be a special case."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter))
    return model


class _LowRankAddmm(torch.autograd.Function):
    """y = x W^T + (x Ap^T) Bt^T, the base first and every product accumulated in place."""

    @staticmethod
    def forward(ctx, x, weight, Ap, Bt):
        U = x @ Ap.t()
        ctx.save_for_backward(x, U, weight, Ap, Bt)
        return F.linear(x, weight).addmm_(U, Bt.t())

    @staticmethod
    def backward(ctx, grad):
        x, U, weight, Ap, Bt = ctx.saved_tensors
        H = grad @ Bt
        dx = (grad @ weight).addmm_(H, Ap) if ctx.needs_input_grad[0] else None
        return dx, None, H.t() @ x, grad.t() @ U


class AddmmLinear(OfficialLinear):
    """The same function with one autograd node and ``addmm_`` a linear, as fast LoRA code has it.

    Concatenation, casts and d are left to autograd, in weight space. x is (M, in); no bias.
    """

    def forward(self, x):
        Ap = torch.cat([self.A, self.pool.A], 0).to(x.dtype)
        Bt = (torch.cat([self.B, self.pool.B], 1) * self.d).to(x.dtype)
        return _LowRankAddmm.apply(x, self.base_layer.weight, Ap, Bt)
