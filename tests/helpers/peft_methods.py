"""Tiny Llamas under PEFT with any method, and the names of their tensors."""

import re

import peft
import torch
from torch import Tensor, nn

from rasa_ext.peft import RasaConfig
from tests.helpers import outside  # noqa: F401 - defines vera and picked
from tests.helpers.tiny_lm import make_model

LAYERS = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("up", "down")]
CASES = {
    "vera": ("vera", {"d_initial": 0.2}),
    "picked": ("picked", {}),
    "lora": ("lora", {"alpha": 8.0}),
    "lora-fa": ("lora", {"train_A": False, "rslora": True}),
    "ranks": ("rasa", {"alpha": 8.0, "k": 1, "rank_pattern": {"up_proj": 6}}),
}
TRAINED = {
    "vera": {"b", "d"},
    "picked": {"A", "B"},
    "lora": {"A", "B"},
    "lora-fa": {"B"},
    "ranks": {"A", "B", "d", "pool_A", "pool_B"},
}
KNOWN = dict(CASES)
"""CASES, and cases that another package's tests add."""


def under_peft(case: str = "vera", seed: int = 1, **options) -> peft.PeftModel:
    """Return a tiny Llama with random adapters; except for stacks, frozen tensors stay initial."""
    name, fields = KNOWN[case]
    torch.manual_seed(seed)
    named = {key if key == "rank_pattern" else f"rasa_{key}": fields[key] for key in fields}
    targets = ["up_proj", "down_proj"]
    shared = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    config = RasaConfig(rasa_method=name, **shared, **named)
    config.inference_mode = bool(config.why_not_trained())
    model = peft.get_peft_model(make_model(), config, **options)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            if isinstance(tensor, nn.Parameter) or "stack" in key:
                tensor.normal_(std=0.2)
    return model.eval()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in state if ".rasa_" in name}


def kinds(names) -> set[str]:
    """Return the method's names of tensors, those of pools as pool_A, in whichever module."""
    fields = (name.rpartition(".rasa_")[2].partition(".")[0] for name in names)
    return {re.sub(r"^pool_\d+_", "pool_", field) for field in fields}
