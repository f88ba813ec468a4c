"""Which layers of a model are adapted, and which of them share a pool. Looks, changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from rasa_ext.base_layers.experts import (
    Bank,
    bank_shape,
    banks_of,
    check_bank,
    expert_weights,
    routers_of,
)
from rasa_ext.base_layers.linear import (
    LinearLayer,
    computes_linear,
    is_linear,
    linear_shape,
    read_directly,
)
from rasa_ext.base_layers.quantized import check_not_repacked, format_of
from rasa_ext.base_layers.split import refusal
from rasa_ext.methods.base import ALL_LINEAR, AdapterConfig, Names
from rasa_ext.methods.patterns import matches_whole
from rasa_ext.patching.grouping import (
    Group,
    check_groups,
    ends_in,
    every_index,
    grouped,
    grouped_banks,
)
from rasa_ext.patching.tokens import TokenRows, check_not_adapted, find_rows

INSTEAD = "leave it out with exclude_modules, or train it in full with modules_to_save"
OUTPUT_HEADS = frozenset({"lm_head", "score", "classifier"})
_LAST_NAMES = frozenset({"head", "heads", "fc"})
"""Of a vision model's output head, where it is the last linear layer and outside of all blocks."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The changes that patching a model would make."""

    groups: tuple[Group, ...]
    skipped: dict[str, str]
    """Linear layers, 1x1 convolutions and weights of experts that stay as they are, and why."""
    untouched: dict[str, tuple[int, ...]]
    """Names and shapes of those expert weights that nobody chose to leave out."""
    modules_to_save: tuple[str, ...]
    """Names of the modules that are trained in full."""
    tokens: tuple[TokenRows, ...] = ()
    """The tables of which rows are trained."""


def make_plan(
    model: nn.Module,
    config: AdapterConfig,
    linears: Mapping[str, LinearLayer] | None = None,
    banks: Mapping[str, Bank] | None = None,
) -> Plan:
    """Find the layers that a config names in a model, and group them. The model is only read.

    Args:
        model: any module that holds linear layers.
        config: of any method.
        linears: the layers to choose from, by name; by default every linear layer of the model.
        banks: stacked expert weights to choose from, which only a config with ``experts`` takes.

    Returns:
        What ``patch_model`` would change.

    Raises:
        TypeError, ValueError: naming the argument, where nothing or something impossible is named.

    Example:
        >>> config = rasa_ext.RasaConfig(target_modules=["q_proj", "v_proj"])
        >>> plan = rasa_ext.patching.make_plan(model, config)
        >>> [group.pattern for group in plan.groups]
        ['model.layers.*.self_attn.q_proj', 'model.layers.*.self_attn.v_proj']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if linears is None:
        linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if "" in linears:
        raise ValueError(
            "model: expected a module that holds linear layers, got a linear layer itself, which "
            "cannot be replaced in place; wrap it, for example in torch.nn.Sequential."
        )
    check_not_repacked(model)
    banks = _banks(model, config, banks)
    saved = _modules_to_save(model, config.modules_to_save)
    tokens = find_rows(model, config)
    reasons = unadaptable(model, {**linears, **banks})
    usual = _left_out(model, linears)
    skipped: dict[str, str] = {}
    chosen: list[str] = []
    explicit = config.target_modules != ALL_LINEAR
    for name in _matched(model, {**linears, **banks}, config.target_modules):
        kept = next((s for s in saved if name == s or name.startswith(f"{s}.")), None)
        if matches(name, config.exclude_modules):
            skipped[name] = "named by exclude_modules"
        elif kept is not None and explicit:
            raise ValueError(
                f"modules_to_save: {kept!r} is trained in full, but target_modules also adapts "
                f"{name!r} in it; name it in one of the two, or in exclude_modules."
            )
        elif kept is not None:
            skipped[name] = "trained in full, named by modules_to_save"
        elif name in reasons:
            if explicit:
                raise ValueError(
                    f"target_modules: cannot adapt {name!r}: {reasons[name]}; {INSTEAD}."
                )
            skipped[name] = reasons[name]
        elif not explicit and (reason := usual.get(name)):
            skipped[name] = reason
        else:
            chosen.append(name)
    if not chosen:
        why = "".join(f" {name}: {reason}." for name, reason in list(skipped.items())[:5])
        if explicit and isinstance(config.target_modules, str):
            why += " A string but 'all-linear' is a regular expression over a whole name; names"
            why += " go into a list."
        raise ValueError(
            f"target_modules: expected at least one linear layer, but {config.target_modules!r} "
            f"leaves none of the model's {len(linears)}.{why}{_others(model, config)}"
        )
    for name in (*linears, *banks):
        if name not in chosen:
            skipped.setdefault(name, "not named by target_modules")
    for name, reason in _pointwise_convolutions(model).items():
        if not any(name == each or name.startswith(f"{each}.") for each in saved):
            skipped[name] = reason
    shapes, stacks = {}, {}
    for name in chosen:
        if name in banks:
            check_bank(name, banks[name])
            stacks[name] = bank_shape(*banks[name])
        else:
            _check_weight(name, linears[name])
            shapes[name] = linear_shape(linears[name])
    if banks and not stacks:
        first = next(iter(banks))
        raise ValueError(
            f"experts: expected stacked weights to adapt, but every one is left out, such as "
            f"{first!r}: {skipped[first]}; change that, or leave out experts."
        )
    check_not_adapted(tokens, chosen)
    check_groups(config.layer_groups, chosen)
    config.check_layers(chosen)
    groups = grouped(shapes, config.layer_groups)
    if stacks:
        groups += grouped_banks(stacks, str(config.grouping_of_experts), config.layer_groups)
    trained = tuple(f"{name}." for name in saved)
    untouched = {
        name: shape
        for name, shape in expert_weights(model).items()
        if name not in stacks and name not in skipped and not name.startswith(trained)
    }
    adaptable = adaptable_banks(model, config)
    for name, shape in untouched.items():
        how = "the argument experts adapts them" if name in adaptable else "no linear layer"
        skipped[name] = f"weights of shape {shape}: {how}"
    return Plan(groups, skipped, untouched, saved, tokens)


def _banks(
    model: nn.Module, config: AdapterConfig, given: Mapping[str, Bank] | None
) -> Mapping[str, Bank]:
    """Give the stacked weights to choose from; ValueError where experts are asked for in vain."""
    if config.grouping_of_experts is None:
        return {}
    banks = banks_of(model) if given is None else given
    if not banks:
        others = ", ".join(list(expert_weights(model))[:3])
        others = f"; its other weights are {others}" if others else ""
        raise ValueError(
            "experts: expected a model with stacked experts that say how they lie, as those of "
            f"transformers 5 do, found none{others}; leave out experts."
        )
    return banks


def adaptable_banks(model: nn.Module, config: AdapterConfig) -> set[str]:
    """Name the stacked weights that the argument ``experts`` would adapt."""
    found = set()
    for name, bank in banks_of(model).items() if hasattr(config, "experts") else ():
        with contextlib.suppress(TypeError, ValueError):
            check_bank(name, bank)
            found.add(name)
    return found


def resolve_config(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """Drop names in the lists of ``config`` that match no module of ``model``.

    ``modules_to_save`` become whole names, and so do those of ``trainable_token_indices``. This is
    for configs from files: PEFT takes lists that name layers of several kinds of models.
    """
    modules = [name for name, _ in model.named_modules() if name]
    modules += banks_of(model)
    targets = config.target_modules
    if not isinstance(targets, str):
        known = (item for item in targets if any(matches(name, (item,)) for name in modules))
        targets = tuple(known) or targets
    saved = tuple(name for name in modules if matches(name, config.modules_to_save))
    groups = config.layer_groups
    if not callable(groups):
        kept = (
            (label, tuple(each for each in items if any(ends_in(name, each) for name in modules)))
            for label, items in groups
        )
        groups = tuple((label, items) for label, items in kept if items)
    return dataclasses.replace(
        config,
        target_modules=targets,
        modules_to_save=saved,
        trainable_token_indices=tuple(
            (rows.names[0], rows.ids) for rows in find_rows(model, config)
        ),
        groups=groups,
    )


def matches(name: str, names: Names) -> bool:
    """Tell whether a name matches a regular expression as a whole, or ends in a suffix."""
    if isinstance(names, str):
        return matches_whole(names, name)
    return any(name == item or name.endswith(f".{item}") for item in names)


def _others(model: nn.Module, config: AdapterConfig) -> str:
    """Name the modules that hold weights of their own and were meant, but are no linear layers."""
    targets = config.target_modules
    found = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not is_linear(module)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
        and (targets == ALL_LINEAR or matches(name, targets))
    }
    shown = ", ".join(f"{name} ({kind})" for name, kind in list(found.items())[:5])
    return (
        f" {shown}{', ...' if len(found) > 5 else ''}: no linear layers; modules_to_save trains "
        "such modules in full."
        if found
        else ""
    )


def _matched(model: nn.Module, linears: Mapping[str, Any], targets: Names) -> list[str]:
    if targets == ALL_LINEAR:
        return list(linears)
    if not isinstance(targets, str):
        for item in targets:
            if not any(matches(name, (item,)) for name in linears):
                if any(matches(name, (item,)) for name in banks_of(model)):
                    raise ValueError(
                        f"target_modules: {item!r} names stacked expert weights, which are adapted "
                        "with the argument experts, such as experts='shared'."
                    )
                known = sorted({name.rpartition(".")[2] for name in linears})
                for name, module in model.named_modules():
                    if matches(name, (item,)):
                        raise ValueError(
                            f"target_modules: expected names of linear layers, but {name!r} is a "
                            f"{type(module).__name__}; name the linear layers in it, or name it "
                            "in modules_to_save to train it in full."
                        )
                raise ValueError(
                    f"target_modules: expected names of linear layers, but no linear layer's name "
                    f"ends in {item!r}; the model's end in {', '.join(known[:20]) or 'nothing'}."
                )
    return [name for name in linears if matches(name, targets)]


def _modules_to_save(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    saved: list[str] = []
    for item in names:
        found = [name for name, _ in model.named_modules() if name and matches(name, (item,))]
        if not found:
            raise ValueError(
                f"modules_to_save: expected suffixes of module names, but no module's name ends "
                f"in {item!r}."
            )
        saved += [name for name in found if name not in saved]
    return tuple(saved)


def unadaptable(model: nn.Module, linears: Mapping[str, Any]) -> dict[str, str]:
    """Find the linear layers that cannot be adapted, each with the reason."""
    reasons: dict[str, str] = {}
    for parent_name, parent in model.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        kind: Any = type(parent)
        if hasattr(parent, "base_layer"):
            reason = f"part of {parent_name!r}, which is already adapted ({kind.__name__})"
            reasons.update((name, reason) for name in linears if name.startswith(prefix))
            continue
        for key, child in parent.named_children():
            if f"{prefix}{key}" in linears and is_linear(child) and key in read_directly(kind):
                reasons[f"{prefix}{key}"] = f"{kind.__name__} reads its weight without calling it"
    for name, module in linears.items():
        if is_linear(module) and format_of(module) is None and not computes_linear(module):
            reasons[name] = f"a {type(module).__name__}, which does not compute x W^T + bias"
    return reasons


def _left_out(model: nn.Module, linears: Mapping[str, LinearLayer]) -> dict[str, str]:
    """Find the layers that are adapted only where they are named, with the reason."""
    routers = routers_of(model)
    inside = tuple(f"{name}." for name in routers)
    reason = "a router or gate of experts, adapted if target_modules names it"
    chosen = {name: reason for name in linears if name in routers or name.startswith(inside)}
    return {**chosen, **_heads(model, linears)}


def _heads(model: nn.Module, linears: Mapping[str, LinearLayer]) -> dict[str, str]:
    """Find the layers that turn features into the model's answer, with the reason to think so."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tied = {id(embedding.weight) for embedding in embeddings}
    output = _ask(model, "get_output_embeddings")
    answer = _ask(model, "get_classifier")  # timm's; two where a model is distilled
    answers = answer if isinstance(answer, tuple | list) else (answer,)
    classifier = {m for a in answers if isinstance(a, nn.Module) for m in a.modules()}
    heads = {}
    for name, module in linears.items():
        if OUTPUT_HEADS & set(name.split(".")):
            heads[name] = "an output head"
        elif id(module.weight) in tied:
            heads[name] = "tied to an embedding"
        elif module is output:
            heads[name] = "the model's output embedding"
        elif module in classifier:
            heads[name] = "the model's classifier"
    last = list(linears)[-1] if linears else ""
    if last not in heads and every_index(last) == last:  # outside of every repeated block
        words = max(embeddings, key=lambda each: each.num_embeddings, default=None)
        out, width = linear_shape(linears[last]) if linears else (0, 0)
        if last.partition(".")[0] in _LAST_NAMES:
            heads[last] = "an output head: the last linear layer, of that name"
        elif words and out > width and (out, width) == tuple(words.weight.shape):
            heads[last] = "an output head: the last linear layer, shaped like the embedding"
        elif out and out == _num_labels(model):
            heads[last] = "an output head: the last linear layer, one output a label"
    return heads


def _ask(model: nn.Module, method: str) -> Any:
    """What a model says of itself; None where it has another method of that name, or none."""
    try:
        return getattr(model, method)()
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _num_labels(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(model, "num_classes", None) or getattr(config, "num_labels", None)


def _pointwise_convolutions(model: nn.Module) -> dict[str, str]:
    """Find the convolutions that compute what a linear layer does, with the reason against them."""
    reason = "a 1x1 convolution, not a linear layer"
    return {
        name: reason
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and set(module.kernel_size) == {1}
        and module.groups == 1
    }


def _check_weight(name: str, module: LinearLayer) -> None:
    weight: Any = module.weight  # of a module of any origin, to be looked at
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"target_modules: {name!r} has no weight yet (a lazy layer); run one forward first."
        )
    if (fmt := format_of(module)) is not None:
        fmt.check(name, module)
    elif not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"target_modules: {name!r} has a weight of {found}, expected a floating-point weight; "
            "leave it out with exclude_modules."
        )
    if (reason := refusal(module)) is not None:
        raise ValueError(f"target_modules: {name!r} {reason}.")
    if 0 in linear_shape(module) or weight.numel() == 0:
        raise ValueError(
            f"target_modules: {name!r} has a weight of shape {tuple(weight.shape)}, expected one "
            "without a zero; gather sharded weights before patching, or use exclude_modules."
        )


def suffixes(names: list[str], model: nn.Module) -> list[str]:
    """Find the shortest name suffixes that match these layers and no other module of the model."""
    adapted = set(names)
    others = {
        name.replace(".base_layer", "")
        for name, _ in model.named_modules()
        if name and not _inside(name, adapted)
    }
    return shortest_suffixes(names, others)


def shortest_suffixes(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Find the shortest suffixes, at dots, of names that none of the others ends in."""
    taken: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if not any(other == suffix or other.endswith(f".{suffix}") for other in others):
                break
        taken[suffix] = None
    return list(taken)


def _inside(name: str, adapted: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in adapted for end in range(1, len(parts) + 1))
