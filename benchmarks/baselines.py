"""The baselines of rasa_ext, written so that they run in the same process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import rasa_ext
from rasa_ext import ops
from rasa_ext.methods import LayerSpec
from rasa_ext.nn.packs import Decoding, PackSet


class OfficialLinear(nn.Module):
    """The official code's formula: concatenate in every forward, and leave the rest to autograd.

    Parameters are float32 and cast to the input's dtype. This favours the baseline: the official
    code computes the adapter in float32.
    """

    def __init__(self, layer: rasa_ext.RasaLinear) -> None:
        super().__init__()
        self.base_layer, self.A, self.d = layer.base_layer, layer.A, layer.d
        self.p = layer.config.dropout
        # B is (out, r), as the official code stores it.
        self.B = nn.Parameter(layer.B.detach().contiguous())
        shared = layer.pool.__dict__
        if "official" not in shared:  # one copy for all layers of a pool, with separate gradients
            copies = (layer.pool.A.detach().clone(), layer.pool.B.detach().contiguous())
            shared["official"] = tuple(map(nn.Parameter, copies))
        self.A_pool, self.B_pool = shared["official"]

    def factors(self):
        return self.A, self.A_pool, self.B, self.B_pool, self.d

    def forward(self, x):
        result = self.base_layer(x)
        A = torch.cat([self.A, self.A_pool], 0).to(x.dtype)
        B = torch.cat([self.B, self.B_pool], 1).to(x.dtype)
        result += F.linear(F.linear(self.dropped(x), A) * self.d.to(x.dtype), B) * 1.0
        return result

    def dropped(self, x):
        return F.dropout(x, self.p) if self.p and self.training else x


def swap(model: nn.Module, make) -> nn.Module:
    """Replace every RasaLinear of a patched model by ``make(layer)``."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, rasa_ext.RasaLinear):
                parent._modules[key] = make(child)
    return model


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules over the same parameters, so that five variants fit one base."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def one_of(base: nn.Module, config: rasa_ext.RasaConfig, layers: int) -> rasa_ext.RasaLinear:
    """Adapt ``base`` as the first layer of a group of ``layers`` layers."""
    spec = LayerSpec(0, layers, base.out_features, base.in_features, base.weight.device)
    pool = config.group_tensors([dataclasses.replace(spec, index=index) for index in range(layers)])
    decoding = Decoding()
    decoding.now = True  # no model says so: without grad, the packs are read as in generate
    layer = rasa_ext.RasaLinear(base, config, spec, rasa_ext.nn.RasaPool(pool), PackSet(decoding))
    layer.add_module("own_pool", layer.pool)  # no model has it
    return layer


class Alone(nn.Module):
    """A model that computes projections of one input separately, or together if ``fused``."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        super().__init__()
        self.model, self.fused = model, fused

    def forward(self, *args, **kwargs):
        before, ops.fuse_projections = ops.fuse_projections, lambda *_: self.fused
        try:
            return self.model(*args, **kwargs)
        finally:
            ops.fuse_projections = before


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a patched model's adapters values as in training; zeros would be a special case."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise.to(parameter))
    return model


@contextlib.contextmanager
def cublas() -> Iterator[None]:
    """Compute products of the compiled library only with cuBLAS, not with its own kernels."""
    before = os.environ.get("RASA_EXT_KERNELS")
    os.environ["RASA_EXT_KERNELS"] = "cublas"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RASA_EXT_KERNELS"]
        else:
            os.environ["RASA_EXT_KERNELS"] = before


class Cublas(nn.Module):
    """A model with a training step that should run under ``cublas``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        with cublas():
            return self.model(*args, **kwargs)


class _LowRankAddmm(torch.autograd.Function):
    """y = x W^T + (x Ap^T) Bt^T, with the base first and every product accumulated in place."""

    @staticmethod
    def forward(ctx, x, seen, weight, Ap, Bt):
        U = seen @ Ap.t()
        ctx.save_for_backward(seen, U, weight, Ap, Bt)
        ctx.one = seen is x
        return F.linear(x, weight).addmm_(U, Bt.t())

    @staticmethod
    def backward(ctx, grad):
        seen, U, weight, Ap, Bt = ctx.saved_tensors
        H = grad @ Bt
        dx, dseen = grad @ weight if ctx.needs_input_grad[0] else None, None
        if dx is not None and ctx.one:
            dx.addmm_(H, Ap)
        elif dx is not None:
            dseen = H @ Ap
        return dx, dseen, None, H.t() @ seen, grad.t() @ U


class AddmmLinear(OfficialLinear):
    """The official formula with one autograd node and ``addmm_`` per linear, as in fast LoRA code.

    Autograd does concatenation, casts and d, in weight space. x is (..., in); no bias.
    """

    def forward(self, x):
        shape, x = x.shape[:-1], x.flatten(0, -2)
        Ap = torch.cat([self.A, self.A_pool], 0).to(x.dtype)
        Bt = (torch.cat([self.B, self.B_pool], 1) * self.d).to(x.dtype)
        y = _LowRankAddmm.apply(x, self.dropped(x), self.base_layer.weight, Ap, Bt)
        return y.unflatten(0, shape)
