"""Two-layer mixtures of experts under PEFT, with adapters on stacked expert weights."""

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rasa_ext.peft import RasaConfig, RasaPeftExpertWeight
from tests.helpers import experts, peft

TOKENS = torch.arange(20).view(2, 10)


def moe(
    family: str = "mixtral", dtype: torch.dtype = torch.float64, vocab_size: int = 32
) -> nn.Module:
    """Build a two-layer model in which every weight affects the output.

    In gpt-oss, expert weights are transposed and have biases.
    """
    options = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    model = experts.model(family, vocab_size=vocab_size, num_key_value_heads=1, **options)
    # transformers' grouped products have no float64 on a CPU.
    model.config._experts_implementation = "eager"
    return model.to(dtype).eval()


def lively(model: nn.Module, adapter: str = "default", seed: int = 3) -> nn.Module:
    """Randomize every tensor of an adapter, so that dW is about as large as W."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft.parameters(model).items()):
            if ".rasa_" in name and name.endswith(f".{adapter}"):
                drawn = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(drawn + (".rasa_d." in name))
    return model


def tuned(
    family: str = "mixtral", dtype: torch.dtype = torch.float64, vocab_size: int = 32, **options
) -> PeftModel:
    options = {"r": 3, "rasa_k": 1, "rasa_experts": "shared", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(moe(family, dtype, vocab_size), RasaConfig(**options))
    return lively(model).eval()


def two(**options) -> PeftModel:
    """Build a model with three adapters that differ in grouping, rank and targets.

    "default" is active.
    """
    model = tuned(**options)
    second = {"r": 2, "rasa_experts": "slot", "target_modules": ["q_proj", "experts.down_proj"]}
    model.add_adapter("second", RasaConfig(**second))
    model.add_adapter("third", RasaConfig(r=2, rasa_experts="layer"))
    return lively(lively(model, "second", 9), "third", 11).eval()


def stacks(model: nn.Module) -> dict[str, RasaPeftExpertWeight]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, RasaPeftExpertWeight)
    }


def dense(model: PeftModel, *adapters: str, family: str = "mixtral") -> Tensor:
    """Compute float64 reference logits: the base with these adapters' dW in its weights."""
    return peft.dense(model, *adapters, base=moe(family), tokens=TOKENS)


def close(logits: Tensor, expected: Tensor) -> None:
    """Assert equality within float32 rounding: norms use float32 even in a float64 model."""
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
