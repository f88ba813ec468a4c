"""Changes to a model beside the new layers, so that they are called, trained and fused."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.experts import has_quantized_experts
from rasa_ext.base_layers.quantized import quantizer_changes
from rasa_ext.nn.adapted_experts import BareExperts
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.nn.fused_projections import FusedProjections

PROJECTIONS_OF_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names of sibling projections that read one input."""


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each module by ``new[module]``, under every name it is registered by."""
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and child in new
    ]
    for parent, key, child in places:
        parent._modules[key] = new[child]


def remove_children(model: nn.Module, kind: type[nn.Module]) -> None:
    """Remove the children of a kind from every module."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, kind):
                del module._modules[name]


def link_layers(model: nn.Module, kind: type[AdaptedLinear]) -> None:
    """Link layers of ``kind`` that may read one input, to be fused."""
    for parent in model.modules():
        for names in PROJECTIONS_OF_ONE_INPUT:
            children = (parent._modules.get(name) for name in names)
            layers = [child for child in children if isinstance(child, kind)]
            if len({layer.in_features for layer in layers}) == 1 < len(layers):
                fused = FusedProjections(layers)
                for layer in layers:
                    layer.fused = fused


class Absent:
    """Marks an attribute that was not set on the object itself."""


FAST_PATH = "activation_relu_or_gelu"
"""The attribute that lets ``nn.TransformerEncoderLayer`` take its fused path."""


def prepare_model(
    model: nn.Module, adapted: Container[nn.Module], hide_quantizer: bool
) -> list[tuple[nn.Module, str, Any]]:
    """Disable what bypasses adapted layers, or blocks gradients through quantized ones.

    In eval without grad, ``nn.TransformerEncoderLayer`` reads the layers' weights directly. Without
    the attribute for a known activation it takes the ordinary path, with an equal result.
    ``quantizer_changes`` has the rest.

    Returns:
        The changes, as (module, attribute, value before), for ``undo``.
    """
    changes = quantizer_changes(model, hide_quantizer)
    changes += [
        (module, "forward", BareExperts(module).adapted_forward)
        for module in list(model.modules())
        if has_quantized_experts(module)
    ]
    for kind, name, value in (
        (nn.TransformerEncoderLayer, FAST_PATH, 0),
        (nn.TransformerEncoder, "use_nested_tensor", False),
    ):
        encoders = (module for module in model.modules() if isinstance(module, kind))
        changes += [
            (encoder, name, value)
            for encoder in encoders
            if any(child in adapted for child in encoder.modules())
        ]
    before = [(module, name, vars(module).get(name, Absent)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    return before


def undo(changes: Sequence[tuple[nn.Module, str, Any]]) -> None:
    """Restore the attributes that ``prepare_model`` changed, the last first."""
    for module, name, value in reversed(changes):
        if value is Absent:  # the class has it
            delattr(module, name)
        else:
            setattr(module, name, value)


def require_grad(model: nn.Module, names: Iterable[str]) -> list[Any]:
    """Make the outputs of these modules require grad while training; return the hooks."""
    return [model.get_submodule(name).register_forward_hook(_require_grad) for name in names]


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: make the output require grad. (A module-level function can be pickled.)"""
    if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
        return
    if isinstance(output, Tensor) and output.is_floating_point() and output.is_leaf:
        output.requires_grad_(True)
