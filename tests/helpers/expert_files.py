"""Tiny mixtures of experts with adapters, and dW of their stacked weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext.nn.rasa_experts import RasaExpertWeight
from tests.helpers import experts as mixtures
from tests.helpers import oracle

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h")
RANK = 3


def build(family: str, **options: Any) -> nn.Module:
    """Build a causal language model of two layers in which every weight affects the output."""
    return mixtures.model(family, **options).eval()


def adapted(base: nn.Module, experts: str = "slot", k: int = 1, **options: Any) -> nn.Module:
    """Return a patched copy with randomized adapters, so that dW != 0."""
    model = rasa_ext.patch_model(copy.deepcopy(base), RANK, k, experts=experts, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise)
    return model


def stacks(model: nn.Module) -> dict[str, RasaExpertWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, RasaExpertWeight)}


def of_experts(stack: RasaExpertWeight) -> list[oracle.Adapter]:
    """Return each expert's adapter, with the expert's own pool or the pool of all experts."""
    return oracle.of_experts(stack.adapter().factors())


def changes(model: nn.Module) -> dict[str, Tensor]:
    """Compute dW (E, out, in) in float64 of every adapted stacked weight."""
    return {
        name: torch.stack([oracle.delta(each) for each in of_experts(stack)])
        for name, stack in stacks(model).items()
    }


TOKENS = torch.arange(24).view(2, 12) * 7 % 32


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits
