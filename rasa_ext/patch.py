"""Patching a model in place, and taking the patch off again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.config import ALL_LINEAR, RasaConfig
from rasa_ext.modules import AdaptedLinear, RasaLinear, RasaPool
from rasa_ext.quantized import keep_trainable
from rasa_ext.record import Record, rasa_layers, record_of, set_record, unwrap
from rasa_ext.siblings import Siblings
from rasa_ext.targets import Plan, make_plan, places


def patch_model(
    model: nn.Module,
    rank: int = 8,
    k: int | None = 1,
    *,
    alpha: float = 8.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    adapter_dtype: torch.dtype = torch.float32,
    config: RasaConfig | None = None,
) -> nn.Module:
    """Give a model's linear layers RaSA adapters, in place, and freeze everything else.

    The output stays what it was until training begins, since every B starts at zero. Which layers
    are adapted, how they are grouped and what was left out is in ``summary(model)``.

    Args:
        model: any module that holds ``nn.Linear`` or transformers ``Conv1D`` layers.
        rank, k, alpha, dropout, target_modules, exclude_modules, modules_to_save, adapter_dtype:
            the fields of ``RasaConfig``, whose help texts say what each does and costs.
        config: all of them at once; the others must then be left at their defaults.

    Returns:
        The same object.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. The model is
            then unchanged.
    """
    given = RasaConfig(
        rank=rank,
        k=k,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,  # type: ignore[arg-type]
        exclude_modules=exclude_modules,  # type: ignore[arg-type]
        modules_to_save=modules_to_save,  # type: ignore[arg-type]
        adapter_dtype=adapter_dtype,
    )
    if config is None:
        config = given
    elif not isinstance(config, RasaConfig):
        raise TypeError(f"config: expected a RasaConfig, got {type(config).__name__}.")
    elif given != RasaConfig():
        raise ValueError(
            "config: expected either config or the single arguments, got both; "
            f"single arguments, default: {'; '.join(given.differences(RasaConfig()))}."
        )
    refuse_patched(model)
    apply_plan(model, config, make_plan(model, config))
    return model


def refuse_patched(model: nn.Module) -> None:
    """Raise ValueError where a model carries RaSA layers already."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, module in modules:
        if isinstance(module, RasaLinear):
            raise ValueError(
                f"model: expected an unpatched model, but {name!r} is a RasaLinear already; "
                "call rasa_ext.unpatch(model) or rasa_ext.merge_and_unload(model) first."
            )


def apply_plan(model: nn.Module, config: RasaConfig, plan: Plan) -> None:
    """Carry out a plan that ``make_plan`` made for this model and config."""
    if plan.experts:
        shown = ", ".join(f"{name} {shape}" for name, shape in list(plan.experts.items())[:3])
        warnings.warn(
            f"{len(plan.experts)} stacked (3-D) weights are not linear layers and stay untouched, "
            f"among them {shown}.",
            stacklevel=3,
        )
    # Everything that can fail, running out of memory included, happens before the model changes.
    modules = dict(model.named_modules())
    wrapped: dict[nn.Module, RasaLinear] = {}
    for group in plan.groups:
        layers, (out, width) = len(group.names), group.shape
        first = modules[group.names[0]].weight
        pool = RasaPool.create(config, layers, out, width, first) if config.k else None
        for name in group.names:
            base = modules[name]
            owns = name == group.names[0]
            wrapped[base] = RasaLinear(base, config, layers, pool, owns_pool=owns)
    record = Record(
        config=config,
        plan=plan,
        trainable_before=frozenset(n for n, p in model.named_parameters() if p.requires_grad),
        attributes_before=skip_fast_paths(model, wrapped) + keep_trainable(model, mark=True),
        hooks=_let_gradients_into_checkpoints(model),
    )
    model.requires_grad_(False)
    for parent, key in places(model, wrapped):
        parent._modules[key] = wrapped[parent._modules[key]]
    introduce_siblings(model)
    for layer in wrapped.values():
        for parameter in (layer.A, layer.B, layer.d):
            parameter.requires_grad_(True)
        if layer.pool is not None:
            layer.pool.requires_grad_(True)
    for name in plan.saved:
        for parameter in modules[name].parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    set_record(model, record)


def introduce_siblings(model: nn.Module) -> None:
    """Let the layers of one parent that read inputs of one width find out who reads the same."""
    for parent in model.modules():
        by_width: dict[int, list[AdaptedLinear]] = {}
        for child in dict.fromkeys(parent.children()):
            if isinstance(child, AdaptedLinear):
                by_width.setdefault(child.in_features, []).append(child)
        for layers in by_width.values():
            if len(layers) > 1:
                together = Siblings()
                for layer in layers:
                    layer.siblings = together


def remove_layers(model: nn.Module) -> nn.Module:
    """Put every base layer, with the weights it has now, back in its place."""
    root, record = unwrap(model), record_of(model)
    layers = {layer: layer.base_layer for _, layer in rasa_layers(root)}
    for parent, key in places(root, layers):
        parent._modules[key] = layers[parent._modules[key]]
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in record.trainable_before)
    for module, name, value in record.attributes_before:
        setattr(module, name, value)
    for hook in record.hooks:
        hook.remove()
    set_record(root, None)
    return model


FAST_PATH = "activation_relu_or_gelu"
"""The attribute by which ``nn.TransformerEncoderLayer`` knows that its fused path may be taken."""


def skip_fast_paths(model: nn.Module, wrapped: dict) -> list[tuple[nn.Module, str, Any]]:
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


def _let_gradients_into_checkpoints(model: nn.Module) -> list[Any]:
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
