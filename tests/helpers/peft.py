"""Small PEFT models with randomized adapters, and their float64 reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rasa_ext.peft import RasaConfig, RasaPeftExpertWeight, RasaPeftLinear
from rasa_ext.peft.named import NamedAdapters
from tests.helpers import oracle
from tests.helpers.adapters import RANK, adapters, randomize, randomize_adapters
from tests.helpers.oracle import Adapter
from tests.helpers.tiny_lm import make_model

__all__ = ["RANK", "adapters"]

TOKENS = torch.arange(24).view(2, 12)


def adapted(base: nn.Module, seed: int = 3, adapter_name: str = "default", **options) -> PeftModel:
    """Return a PEFT model over a copy of ``base`` with a randomized adapter, so that dW != 0."""
    config = RasaConfig(**{"r": RANK, "rasa_k": 1, **options})
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=adapter_name)
    randomize(model, seed)
    return model


def tiny(seed: int = 3, **options) -> PeftModel:
    """Return a tiny Llama with a randomized adapter."""
    return adapted(make_model(), seed, **{"task_type": "CAUSAL_LM", **options})


def two(**options) -> PeftModel:
    """Return a tiny Llama with two adapters of different rank, k and targets.

    "default" is active, "second" is not.
    """
    model = tiny(**options)
    second = RasaConfig(r=6, rasa_k=3, target_modules=["q_proj", "down_proj"])
    model.add_adapter("second", second)
    randomize_adapters(named(model, "second"), 9)
    return model.eval()


def dense(
    model: PeftModel, *adapter_names: str, base: nn.Module | None = None, tokens: Tensor = TOKENS
) -> Tensor:
    """Compute float64 reference logits: the base with dW of ``adapter_names`` in the weights."""
    base = (make_model() if base is None else base).double().requires_grad_(False)
    for name, owner in plain(model).named_modules():
        for adapter in adapter_names:
            if adapter not in getattr(owner, "configs", ()):
                continue
            change, stacked = changes(owner, adapter), isinstance(owner, RasaPeftExpertWeight)
            weight = base.get_parameter(name if stacked else f"{name}.weight")
            weight.add_(change if change.shape == weight.shape else change.mT)
    return base(tokens).logits


def changes(owner: NamedAdapters, adapter: str = "default") -> Tensor:
    """Compute an adapter's dW by the oracle: (out, in), or (E, out, in) for stacked experts."""
    factors = owner.named(adapter).factors()
    if factors.A.dim() == 2:
        return oracle.delta(Adapter(*factors))
    return torch.stack([oracle.delta(each) for each in oracle.of_experts(factors)])


def close(logits: Tensor, expected: Tensor) -> None:
    """Assert that a float32 model's logits agree with the float64 reference."""
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def plain(model: PeftModel) -> nn.Module:
    """Return the model inside PEFT's wrapper, with layer names as without PEFT."""
    return model.get_base_model()


def layers(model: nn.Module) -> dict[str, RasaPeftLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, RasaPeftLinear)}


def named(model: PeftModel, adapter: str) -> dict[str, Adapter]:
    """Return one adapter's parameters (not copies) by layer, whether or not it is active."""
    found = layers(plain(model)).items()
    return {
        n: Adapter(*layer.named(adapter).factors())
        for n, layer in found
        if adapter in layer.configs
    }


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """Compute logits in eval mode without grad, by default for ``TOKENS``."""
    return model.eval()(**({"input_ids": TOKENS} if inputs is None else inputs)).logits
