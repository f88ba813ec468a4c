"""LoRAs of PEFT: save a random one, compute its dW, load one onto a copy of the base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from tests.helpers import oracle

peft = pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"


def save_random_lora(entry, directory, **options):
    """Save a random LoRA with PEFT; return the base and PEFT's model."""
    base = entry.build()
    names = sorted({name.rpartition(".")[2] for name in entry.targets(base)})
    config = peft.LoraConfig(**{"r": 5, "target_modules": names, "lora_dropout": 0.0, **options})
    model = peft.get_peft_model(copy.deepcopy(base), config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    model.save_pretrained(directory)
    return base, model.eval()


def lora_changes(model):
    """Return PEFT's weight changes by layer, each of shape (out, in)."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and module.lora_A:
            delta = module.get_delta_weight("default").detach().double()
            transposed = oracle.is_transposed(module.get_base_layer())
            found[name] = delta.T if transposed else delta
    return found


def load_in_peft(base, directory):
    """Load with PEFT onto a copy of the plain model; any warning (unused keys, say) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
