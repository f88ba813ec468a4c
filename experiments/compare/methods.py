"""A copy of the base model made ready for one method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

import rasa_ext
from rasa_ext import training
from rasa_ext.methods import METHODS


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
    if spec["kind"] == "ours":
        config = METHODS[spec["method"]](**spec["options"])
        return rasa_ext.patch_model(model, config=config)
    from peft import LoraConfig, VeraConfig, get_peft_model

    if spec["kind"] == "lora":
        config = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear")
    else:
        config = VeraConfig(r=spec["rank"], projection_prng_key=seed, target_modules="all-linear")
    return get_peft_model(model, config)


def groups(model: Any, spec: Mapping[str, Any], lr: float) -> list[dict[str, Any]] | None:
    """The optimizer's groups of a method that has some."""
    return training.parameter_groups(model, lr) if spec["kind"] == "ours" else None


def between(
    model: Any, spec: Mapping[str, Any], seed: int
) -> Callable[[torch.optim.Optimizer], Callable[[], object]] | None:
    """What a method does after each of the optimizer's steps, None for nothing.

    ``steps: {gates: {...}}`` are the options of ``ProximalGates``, ``{boosting: {...}}`` those of
    ``Boosting``.
    """
    steps = spec.get("steps") or {}
    if "gates" in steps:
        gates = training.ProximalGates(model, **steps["gates"])
        return lambda optimizer: gates.step
    if "boosting" in steps:
        options = {"seed": seed, **steps["boosting"]}
        return lambda optimizer: training.Boosting(model, optimizer, **options).step
    return None
