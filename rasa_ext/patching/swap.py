"""What a model needs, beside its new layers, for them to be called, trained and fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def registrations_of(
    model: nn.Module, modules: dict[nn.Module, object]
) -> list[tuple[nn.Module, str]]:
    """Every (parent, attribute) under which one of ``modules`` is registered, shared ones too."""
    return [
        (parent, key)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child in modules
    ]


FAST_PATH = "activation_relu_or_gelu"
"""The attribute by which ``nn.TransformerEncoderLayer`` knows that its fused path may be taken."""


def disable_fused_encoder(model: nn.Module, wrapped: dict) -> list[tuple[nn.Module, str, Any]]:
    """Keep torch's fused encoder from reading an adapted layer's base weight behind its back.

    ``nn.TransformerEncoderLayer`` does so in eval without grad; clearing the attribute that says
    its activation is a known one sends it down the ordinary path, with the same result.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    changed = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            child in wrapped for child in module.modules()
        ):
            changed.append((module, FAST_PATH, 0))
        elif isinstance(module, nn.TransformerEncoder) and any(
            child in wrapped for child in module.modules()
        ):
            changed.append((module, "use_nested_tensor", False))
    for module, name, value in changed:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    return before


def enable_input_require_grads(model: nn.Module) -> list[Any]:
    """Hooks that make the embeddings' outputs require grad, as re-entrant checkpoints need.

    A re-entrant checkpoint none of whose inputs requires grad gives its parameters none. Models of
    transformers that take token ids see to it themselves when checkpointing is switched on.
    """
    if getattr(model, "main_input_name", None) == "input_ids":
        return []
    if hasattr(model, "get_input_embeddings"):
        try:
            inputs = [model.get_input_embeddings()]
        except NotImplementedError:
            inputs = []
    else:
        inputs = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return [m.register_forward_hook(_require_grad) for m in inputs if isinstance(m, nn.Module)]


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: let the output take part in autograd. (A module-level function pickles.)"""
    if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
        return
    if isinstance(output, Tensor) and output.is_floating_point() and output.is_leaf:
        output.requires_grad_(True)
