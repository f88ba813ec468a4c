"""Finds the layers of a model that can be adapted, and the reasons against others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rasa_ext.base_layers.experts import (
    expert_shape,
    expert_weight,
    expert_weight_names,
    expert_weights,
    is_experts,
    routers_of,
)
from rasa_ext.base_layers.layouts import quantized_stack
from rasa_ext.base_layers.linear import (
    LinearLayer,
    computes_linear,
    device_of,
    is_conv1d,
    is_linear,
    is_plain,
    linear_shape,
    read_directly,
    stored_weight,
)
from rasa_ext.base_layers.quantized import check_gradients, format_of
from rasa_ext.base_layers.sharded import is_dtensor
from rasa_ext.base_layers.split import Split, refusal, split_of

OUTPUT_HEADS = frozenset({"lm_head", "score", "classifier"})
_LAST_NAMES = frozenset({"head", "heads", "fc"})
"""Names of a vision model's output head, if it is the last linear layer and outside all blocks."""


@dataclasses.dataclass(frozen=True)
class LinearBase:
    """A linear layer, whose weight (out, in) an adapter changes."""

    module: LinearLayer

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)"""
        return linear_shape(self.module)

    @property
    def device(self) -> torch.device:
        """The device on which the layer computes."""
        return device_of(self.module)

    @property
    def split(self) -> Split | None:
        """The part on this process of a layer that is split over processes, or None."""
        return split_of(self.module)

    def values(self) -> Tensor:
        """Return W (out, in), dequantized; not for a layer that is split over processes."""
        weight = stored_weight(self.module).detach()
        if (fmt := format_of(self.module)) is not None:
            return fmt.dequantize(self.module)
        return weight.t() if is_conv1d(self.module) else weight

    def check(self, name: str) -> None:
        """Raise TypeError or ValueError, which begin with the name, if W + dW is not possible."""
        weight: Any = stored_weight(self.module)  # Any: a module of any origin
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name!r} has no weight yet (a lazy layer); run one forward first")
        if (fmt := format_of(self.module)) is not None:
            fmt.check(name, self.module)
        elif not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(
                f"{name!r} has a weight of {kind}, expected floats; load the model dequantized"
            )
        if (reason := refusal(self.module)) is not None:
            raise ValueError(f"{name!r} {reason}")
        if 0 in self.shape or weight.numel() == 0:
            raise ValueError(
                f"{name!r} has a weight of shape {tuple(weight.shape)}, expected a shape without "
                "zeros; gather sharded weights first"
            )


@dataclasses.dataclass(frozen=True)
class StackedBase:
    """The weights of all experts in one 3-D parameter, ``module.key``, which an adapter changes."""

    module: nn.Module
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in), in whatever layout the parameter is."""
        return expert_shape(self.module, self.key)

    @property
    def device(self) -> torch.device:
        """The device of the parameter."""
        device: torch.device = getattr(self.module, self.key).device
        return device

    def values(self) -> Tensor:
        """Return the weights (experts, out, in); not for packed ones."""
        return expert_weight(self.module, self.key).detach()

    def check(self, name: str) -> None:
        """Raise TypeError or ValueError, which begin with the name, if W + dW is not possible."""
        weight: Any = getattr(self.module, self.key)
        if getattr(self.module, "_is_expert_parallel", False):
            raise ValueError(
                f"{name!r} is spread over processes by expert parallelism, expected every expert "
                "on every process; load the model without it"
            )
        if is_dtensor(weight):
            raise ValueError(
                f"{name!r} is sharded over processes, expected a whole weight; patch, then shard it"
            )
        if not is_plain(weight) and quantized_stack(self.module, self.key) is None:
            raise TypeError(
                f"{name!r} is a {type(weight).__name__} of {weight.dtype}, expected floating-point "
                "weights; load the model dequantized"
            )
        if len(weight.shape) != 3 or 0 in weight.shape:
            raise ValueError(
                f"{name!r} has the shape {tuple(weight.shape)}, expected a stack of matrices; "
                "gather sharded weights first"
            )


Base: TypeAlias = LinearBase | StackedBase
"""What an adapter changes: a linear layer, or a stack of experts' weights."""


def stacked_bases(path: str, module: nn.Module) -> dict[str, StackedBase]:
    """Return the stacked weights of a module by name, ``path`` first; none if it has no experts."""
    names = expert_weight_names(module) if is_experts(module) else ()
    return {f"{path}.{name}".lstrip("."): StackedBase(module, name) for name in names}


def base_of(model: nn.Module, name: str, experts: int) -> Base:
    """Return the linear layer called ``name``, or the stacked weight if ``experts`` is not 0."""
    if not experts:
        module: Any = model.get_submodule(name)
        return LinearBase(module)
    path, _, key = name.rpartition(".")
    return StackedBase(model.get_submodule(path), key)


def is_container(module: nn.Module) -> bool:
    """Return whether a module calls or lists all of its children, so that none may be added."""
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def home_of(model: nn.Module, names: Sequence[str], besides: Any = ()) -> str:
    """Return the name of the nearest module with a forward of its own that contains these layers.

    That module's parameters are there whenever the layers run, unlike those of a ModuleList, which
    is sliced and never called. For a single layer it is that layer. Modules of the kinds
    ``besides`` are passed over; if no other is left, it is the model.
    """
    home = names[0]
    while home:
        module = model.get_submodule(home)
        runs = type(module).forward is not nn.Module.forward and not isinstance(module, besides)
        if runs and all(f"{name}.".startswith(f"{home}.") for name in names):
            break
        home = home.rpartition(".")[0]
    return home


@dataclasses.dataclass(frozen=True)
class Survey:
    """The layers of a model that are relevant to adapters, by name."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    linears: Mapping[str, LinearBase]
    stacks: Mapping[str, StackedBase]
    """Stacked expert weights."""

    @functools.cached_property
    def tables(self) -> dict[str, nn.Embedding | nn.Linear]:
        """Embeddings and linear layers by name in the plain model, aliases included."""
        return {
            # PEFT's wrappers hold the module one level below its name; ours replace it there.
            name.removesuffix(".base_layer").removesuffix(".token_adapter"): module
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Embedding | nn.Linear)
        }

    @functools.cached_property
    def input_embedding(self) -> Any:
        """The module that the model returns as input embedding, or None."""
        module = _call_or_none(self.model, "get_input_embeddings")
        return getattr(module, "base_layer", getattr(module, "original_module", module))

    @functools.cached_property
    def output_embedding(self) -> Any:
        """The module that the model returns as output embedding, or None."""
        module = _call_or_none(self.model, "get_output_embeddings")
        return getattr(module, "base_layer", module)

    @property
    def dense_head(self) -> str | None:
        """Name of the output embedding, if it is a linear layer that is not quantized."""
        head = self.output_embedding
        names = (name for name, base in self.linears.items() if base.module is head)
        return next((name for name in names if format_of(head) is None), None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of embeddings that a re-entrant checkpoint needs to require grad.

        It gives its parameters no gradient if none of its inputs requires grad. transformers models
        that take token ids handle this when checkpointing is switched on.
        """
        if getattr(self.model, "main_input_name", None) == "input_ids":
            return ()
        asked = hasattr(self.model, "get_input_embeddings")
        modules = self.modules.items()
        return tuple(
            name
            for name, m in modules
            if (m is self.input_embedding if asked else isinstance(m, nn.Embedding))
        )

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
                reason = f"part of {path!r}, a {kind.__name__} that wraps it already"
                yield from ((name, reason) for name in self.linears if name.startswith(prefix))
                # A wrapper that holds weights under the plain name, as PEFT's do, may get more.
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
        for name, base in self.linears.items():
            if format_of(base.module) is None and not computes_linear(base.module):
                yield name, f"a {type(base.module).__name__}, which does not compute x W^T + bias"

    @functools.cached_property
    def left_out(self) -> dict[str, str]:
        """Layers to adapt only if they are named explicitly, with the reason."""
        routers = routers_of(self.modules)
        inside = tuple(f"{name}." for name in routers)
        reason = "a router or gate of experts, taken only if named"
        gates = {n: reason for n in self.linears if n in routers or n.startswith(inside)}
        return {**gates, **_heads(self)}

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
                stack.check(name)
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
    linears: Mapping[str, LinearBase] | None = None,
    stacks: Mapping[str, StackedBase] | None = None,
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
        linears = {n: LinearBase(module) for n, module in modules.items() if is_linear(module)}
    if stacks is None:
        stacks = {}
        for path, module in modules.items():
            stacks |= stacked_bases(path, module)
    return Survey(model, modules, linears, stacks)


def _heads(layers: Survey) -> dict[str, str]:
    """Return the model's output heads, with the reason to take each for a head."""
    model, linears = layers.model, layers.linears
    embeddings = [m for m in layers.modules.values() if isinstance(m, nn.Embedding)]
    tied = {id(embedding.weight) for embedding in embeddings}
    answer = _call_or_none(model, "get_classifier")  # timm's; a distilled model has two
    answers = answer if isinstance(answer, tuple | list) else (answer,)
    parts = (answer for answer in answers if isinstance(answer, nn.Module))
    classifier: set[nn.Module] = {module for part in parts for module in part.modules()}
    heads = {}
    for name, base in linears.items():
        module = base.module
        if OUTPUT_HEADS & set(name.split(".")):
            heads[name] = "an output head"
        elif id(stored_weight(module)) in tied:
            heads[name] = "tied to an embedding"
        elif module is layers.output_embedding:
            heads[name] = "the model's output embedding"
        elif module in classifier:
            heads[name] = "the model's classifier"
    last = list(linears)[-1] if linears else ""
    repeated = any(part.isdigit() for part in last.split("."))
    if last and last not in heads and not repeated:
        words = max(embeddings, key=lambda table: table.num_embeddings, default=None)
        out, width = linears[last].shape
        config = getattr(model, "config", None)
        labels = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
        if last.partition(".")[0] in _LAST_NAMES:
            heads[last] = "an output head: the last linear layer, with the name of a head"
        elif words and out > width and (out, width) == tuple(words.weight.shape):
            heads[last] = "an output head: the last linear layer, shaped like the embedding"
        elif out and out == labels:
            heads[last] = "an output head: the last linear layer, with one output per label"
    return heads


def _call_or_none(model: nn.Module, method: str) -> Any:
    """Return the result of a model's method, or None if it does not exist or takes arguments."""
    try:
        return getattr(model, method)()
    except (AttributeError, TypeError, NotImplementedError):
        return None
