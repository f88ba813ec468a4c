"""A copy of the base model made ready for one method."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

import rasa_ext


def prepared(base: Any, spec: Mapping[str, Any], seed: int, *, bfloat16: bool) -> Any:
    """A copy of ``base`` (float32) whose parameters that require a gradient are the method's.

    All linear layers are adapted, the output head left alone. What is trained is float32; with
    ``bfloat16`` the frozen weights are rounded to it, which the products would do in any case.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if spec["kind"] == "full":
        return model.requires_grad_(True)
    if bfloat16:
        model = model.to(torch.bfloat16)
    if spec["kind"] == "rasa":
        return rasa_ext.patch_model(
            model, rank=spec["rank"], k=spec["k"], alpha=float(spec["alpha"])
        )
    from peft import LoraConfig, VeraConfig, get_peft_model

    if spec["kind"] == "lora":
        config = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear")
    else:
        config = VeraConfig(r=spec["rank"], projection_prng_key=seed, target_modules="all-linear")
    return get_peft_model(model, config)
