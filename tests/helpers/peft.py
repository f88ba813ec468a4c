"""Small PEFT models with random adapters, their float64 reference, and LoRAs of PEFT's own."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rasa_ext.peft import RasaConfig, RasaPeftExpertWeight, RasaPeftLinear
from rasa_ext.peft.layer import pools_in_files
from rasa_ext.peft.named import NamedAdapters
from tests.helpers import oracle
from tests.helpers.adapters import RANK, adapters, randomize, randomize_adapters
from tests.helpers.models import Entry
from tests.helpers.oracle import Adapter
from tests.helpers.tiny_lm import make_model

__all__ = ["RANK", "adapters"]

WEIGHTS = "adapter_model.safetensors"
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


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters by the names in files, with the adapter's name; pools come last."""
    known = {
        name: key
        for adapter in getattr(model, "peft_config", ())
        for key, name in pools_in_files(model, adapter).items()
    }
    return {known.get(name, name): parameter for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in parameters(model).items() if p.requires_grad}


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """Compute logits in eval mode without grad, by default for ``TOKENS``."""
    return model.eval()(**({"input_ids": TOKENS} if inputs is None else inputs)).logits


def add_noise(model: nn.Module, seed: int) -> None:
    """Add noise to all trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def save_lora(base: nn.Module, directory: Path, **options) -> PeftModel:
    """Save a random LoRA of PEFT for a model, and return it over a copy of the model."""
    config = LoraConfig(**{"r": 5, "lora_dropout": 0.0, **options})
    model = get_peft_model(copy.deepcopy(base), config)
    add_noise(model, 1)
    model.save_pretrained(directory)
    return model.eval()


def save_entry_lora(entry: Entry, directory: Path, **options) -> tuple[nn.Module, PeftModel]:
    """Save a random LoRA for all linear layers of an entry; return the base and PEFT's model."""
    base = entry.build()
    names = sorted({name.rpartition(".")[2] for name in entry.targets(base)})
    return base, save_lora(base, directory, **{"target_modules": names, **options})


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
    with warnings.catch_warnings(action="error", category=UserWarning):
        return PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
