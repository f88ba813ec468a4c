"""Finds the layers of a model that can be adapted, and the reasons against others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.experts import (
    ExpertWeight,
    check_expert_weight,
    expert_shape,
    expert_weights,
    named_expert_weights,
    routers_of,
)
from rasa_ext.base_layers.linear import (
    LinearLayer,
    computes_linear,
    device_of,
    is_linear,
    linear_shape,
    read_directly,
    stored_weight,
)
from rasa_ext.base_layers.quantized import check_gradients, format_of
from rasa_ext.base_layers.split import refusal

OUTPUT_HEADS = frozenset({"lm_head", "score", "classifier"})
_LAST_NAMES = frozenset({"head", "heads", "fc"})
"""Names of a vision model's output head, if it is the last linear layer and outside all blocks."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """The layers of a model that are relevant to adapters, by name."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    linears: Mapping[str, LinearLayer]
    stacks: Mapping[str, ExpertWeight]
    """Stacked expert weights."""

    @functools.cached_property
    def refused(self) -> dict[str, str]:
        """Layers that cannot be adapted, with the reason."""
        return dict(self._refused())

    def _refused(self) -> Iterator[tuple[str, str]]:
        kernels = any(getattr(module, "use_kernels", False) for module in self.modules.values())
        for path, module in self.modules.items():
            prefix = f"{path}." if path else ""
            kind: Any = type(module)
            if hasattr(module, "base_layer"):
                reason = f"part of {path!r}, which is already adapted ({kind.__name__})"
                yield from ((name, reason) for name in self.linears if name.startswith(prefix))
                # A module that holds weights under the adapted name, as in PEFT, may get more.
                paths = {name: name.rpartition(".")[0] for name in self.stacks}
                yield from ((name, reason) for name, at in paths.items() if at.startswith(prefix))
                continue
            # With transformers' use_kernels such a parent reads the weights of its experts itself.
            if kernels and hasattr(kind, "kernel_layer_name"):
                reason = f"{kind.__name__} runs a kernel that reads it; load without use_kernels"
                yield from ((name, reason) for name in self.stacks if name.startswith(prefix))
            for key, child in module.named_children():
                name = f"{prefix}{key}"
                if name in self.linears and is_linear(child) and key in read_directly(kind):
                    yield name, f"{kind.__name__} reads the weight without calling the layer"
        for name, layer in self.linears.items():
            if format_of(layer) is None and not computes_linear(layer):
                yield name, f"a {type(layer).__name__}, which does not compute x W^T + bias"

    @functools.cached_property
    def left_out(self) -> dict[str, str]:
        """Layers that are adapted only if named explicitly, with the reason."""
        routers = routers_of(self.modules)
        inside = tuple(f"{name}." for name in routers)
        reason = "a router or gate of experts, adapted if target_modules names it"
        found = {n: reason for n in self.linears if n in routers or n.startswith(inside)}
        return {**found, **_heads(self)}

    @property
    def expert_weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of weights of experts and routers outside of linear layers, by name."""
        return expert_weights(self.modules)

    @property
    def adaptable(self) -> set[str]:
        """Names of the stacked weights that can be adapted."""
        names = set()
        for name, stack in self.stacks.items():
            with contextlib.suppress(TypeError, ValueError):
                check_expert_weight(name, stack)
                names.add(name)
        return names

    @property
    def pointwise_convolutions(self) -> list[str]:
        """Names of convolutions that are equivalent to a linear layer."""
        return [
            name
            for name, module in self.modules.items()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and set(module.kernel_size) == {1}
            and module.groups == 1
        ]


def survey(
    model: nn.Module,
    linears: Mapping[str, LinearLayer] | None = None,
    stacks: Mapping[str, ExpertWeight] | None = None,
) -> Survey:
    """Return the layers of a model that can be adapted, without changing the model.

    Args:
        model: any module.
        linears: linear layers by name; by default all of the model.
        stacks: stacked expert weights by name; by default all of the model.

    Raises:
        ValueError: a quantized layer would give no gradient to the layers below it.
    """
    modules = dict(model.named_modules())
    check_gradients(modules)
    if linears is None:
        linears = {name: module for name, module in modules.items() if is_linear(module)}
    if stacks is None:
        stacks = {}
        for path, module in modules.items():
            stacks |= named_expert_weights(path, module)
    return Survey(model, modules, linears, stacks)


def base_of(model: nn.Module, name: str, experts: int) -> Any:
    """Return the linear layer called ``name``, or the stacked weight if ``experts`` is not 0."""
    if not experts:
        return model.get_submodule(name)
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def base_shape(base: LinearLayer | ExpertWeight) -> tuple[int, ...]:
    """Return (out, in) of a linear layer, or (experts, out, in) of a stacked weight."""
    return expert_shape(*base) if isinstance(base, tuple) else linear_shape(base)


def base_device(base: LinearLayer | ExpertWeight) -> torch.device:
    """Return the device on which a linear layer or a stacked weight is used."""
    device: torch.device = getattr(*base).device if isinstance(base, tuple) else device_of(base)
    return device


def _heads(found: Survey) -> dict[str, str]:
    """Return the model's output heads, with the reason to take each for a head."""
    model, linears = found.model, found.linears
    embeddings = [m for m in found.modules.values() if isinstance(m, nn.Embedding)]
    tied = {id(embedding.weight) for embedding in embeddings}
    output = ask(model, "get_output_embeddings")
    answer = ask(model, "get_classifier")  # timm's; a distilled model has two
    answers = answer if isinstance(answer, tuple | list) else (answer,)
    parts = (answer for answer in answers if isinstance(answer, nn.Module))
    classifier: set[nn.Module] = {module for part in parts for module in part.modules()}
    heads = {}
    for name, module in linears.items():
        if OUTPUT_HEADS & set(name.split(".")):
            heads[name] = "an output head"
        elif id(stored_weight(module)) in tied:
            heads[name] = "tied to an embedding"
        elif module is output:
            heads[name] = "the model's output embedding"
        elif module in classifier:
            heads[name] = "the model's classifier"
    last = list(linears)[-1] if linears else ""
    repeated = any(part.isdigit() for part in last.split("."))
    if last and last not in heads and not repeated:
        words = max(embeddings, key=lambda each: each.num_embeddings, default=None)
        out, width = linear_shape(linears[last])
        config = getattr(model, "config", None)
        labels = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
        if last.partition(".")[0] in _LAST_NAMES:
            heads[last] = "an output head: the last linear layer, with the name of a head"
        elif words and out > width and (out, width) == tuple(words.weight.shape):
            heads[last] = "an output head: the last linear layer, shaped like the embedding"
        elif out and out == labels:
            heads[last] = "an output head: the last linear layer, with one output per label"
    return heads


def ask(model: nn.Module, method: str) -> Any:
    """Return the result of a model's method, or None if it does not exist or takes arguments."""
    try:
        return getattr(model, method)()
    except (AttributeError, TypeError, NotImplementedError):
        return None


def check_base(name: str, layer: LinearLayer | ExpertWeight) -> None:
    """Raise TypeError or ValueError if the weight of a layer or of experts cannot be adapted."""
    if isinstance(layer, tuple):
        check_expert_weight(name, layer)
        return
    weight: Any = stored_weight(layer)  # Any: a module of any origin
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"target_modules: {name!r} has no weight yet (a lazy layer); run one forward first."
        )
    if (fmt := format_of(layer)) is not None:
        fmt.check(name, layer)
    elif not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"target_modules: {name!r} has a weight of {found}, expected a floating-point weight; "
            "leave it out with exclude_modules."
        )
    if (reason := refusal(layer)) is not None:
        raise ValueError(f"target_modules: {name!r} {reason}.")
    if 0 in linear_shape(layer) or weight.numel() == 0:
        raise ValueError(
            f"target_modules: {name!r} has a weight of shape {tuple(weight.shape)}, expected a "
            "shape without zeros; gather sharded weights before patching, or use exclude_modules."
        )
