"""LoRA-Pro with dense matrices, as a reference for the package, which never forms them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.methods import AdapterConfig, LoraConfig

WIDTHS = (5, 7)
"""Features of every layer: in, out."""


@dataclasses.dataclass(frozen=True)
class Ragged(AdapterConfig):
    """Layer i of a group has i + 1 private ranks and, if ``pooled``, a pool of 2; d is fixed."""

    peft_type: ClassVar[str] = "RAGGED"
    pooled: bool = True
    scale: float | None = 1.5

    def layer_tensors(self, place) -> dict[str, Tensor]:
        rank, pool = place.index + 1, 2 if self.pooled else 0
        own = {
            "A": nn.Parameter(torch.zeros(rank, place.in_features, dtype=self.adapter_dtype)),
            "B": nn.Parameter(torch.zeros(place.out_features, rank, dtype=self.adapter_dtype)),
        }
        if self.scale is not None:
            ranks = torch.arange(rank + pool, dtype=self.adapter_dtype)
            own["d"] = self.scale + ranks / (1 + place.index)
        return own

    def group_tensors(self, places: Sequence) -> dict[str, Tensor]:
        if not self.pooled:
            return {}
        width, out = places[0].in_features, places[0].out_features
        return {
            "A": nn.Parameter(torch.zeros(2, width, dtype=self.adapter_dtype)),
            "B": nn.Parameter(torch.zeros(out, 2, dtype=self.adapter_dtype)),
        }


def build(layers: int, config: AdapterConfig, device: str = "cpu") -> nn.ModuleList:
    """Build the layers of one group, with random float64 adapters."""
    model = nn.ModuleList(nn.Linear(*WIDTHS, dtype=torch.float64) for _ in range(layers))
    config = dataclasses.replace(config, adapter_dtype=torch.float64)
    rasa_ext.patch_model(model.to(device), config=config)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) + 0.3)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained factors by name, without d."""
    named = model.named_parameters()
    return {n: p for n, p in named if p.requires_grad and re.search(r"[._][AB]$", n)}


def changes(model: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """Compute every layer's dW = [B | B_pool] diag(d) [A ; A_pool] from factors: (L, out, in)."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= {name: b.detach() for name, b in model.named_buffers()} | dict(values)
    result = []
    for i, layer in enumerate(model):
        A, B = tensors[f"{i}.A"], tensors[f"{i}.B"]
        pool = "0.rasa_pool_0." if len(model) == 1 else "rasa_pool_0_"  # a layer alone has it
        if f"{pool}A" in tensors:
            A_pool, B_pool = (tensors[f"{pool}{name}"] for name in "AB")
            A, B = torch.cat([A, A_pool]), torch.cat([B, B_pool], 1)
        scale = layer.config.scale if isinstance(layer.config, LoraConfig) else 1.0
        d = tensors.get(f"{i}.d", torch.full((len(A),), scale, dtype=A.dtype, device=A.device))
        result.append(B @ torch.diag(d) @ A)
    return torch.stack(result)


def jacobian(model: nn.Module) -> Tensor:
    """Compute J (L * out * in, elements of the trained factors) by forward-mode autograd."""
    factors = {name: p.detach() for name, p in parameters(model).items()}
    parts = torch.func.jacfwd(lambda values: changes(model, values))(factors)
    rows = len(model) * WIDTHS[0] * WIDTHS[1]
    return torch.cat([parts[name].reshape(rows, -1) for name in factors], dim=1)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflat(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, p in parameters(model).items():
        found[name] = vector[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return found


def set_gradients(model: nn.Module, gradient: Tensor) -> Tensor:
    """Set every factor's gradient to J^T g, for g (L, out, in), and return J^T g, flat."""
    G = jacobian(model).T @ gradient.reshape(-1)
    for name, value in unflat(G, model).items():
        parameters(model)[name].grad = value.clone()
    return G


def gradients(model: nn.Module) -> Tensor:
    return flat([p.grad for p in parameters(model).values()])
