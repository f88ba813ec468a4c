"""Choice of the layers to adapt, and of those that share a pool. The model is only read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from torch import nn

from rasa_ext.base_layers.linear import is_linear
from rasa_ext.base_layers.survey import Base, LinearBase, Survey, survey
from rasa_ext.methods.base import ALL_LINEAR, AdapterConfig, Names
from rasa_ext.methods.patterns import matches_whole
from rasa_ext.patching.grouping import Group, ends_in, group_layers, resolve_groups
from rasa_ext.patching.tokens import TokenRows, check_not_adapted, find_rows

EXCLUDED = "named by exclude_modules"
NOT_LINEAR = "named by target_modules, but not a linear layer"
INSTEAD = "leave it out with exclude_modules, or train it in full with modules_to_save"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The changes that patching would make to a model."""

    config: AdapterConfig
    """The adapter's config, with ``groups`` as a file has them."""
    groups: tuple[Group, ...]
    skipped: dict[str, str]
    """Linear layers, 1x1 convolutions and expert weights that are not adapted, with the reason."""
    untouched: dict[str, tuple[int, ...]]
    """Names and shapes of the expert weights that are neither adapted nor excluded."""
    adaptable: frozenset[str]
    """The untouched weights that the argument ``experts`` would adapt."""
    modules_to_save: tuple[str, ...]
    """Names of the modules that are trained in full."""
    tokens: tuple[TokenRows, ...] = ()
    """The tables with trained rows."""
    dense_head: str | None = None
    """Name of the output embedding, if it is a linear layer that is not quantized."""
    inputs: tuple[str, ...] = ()
    """Names of the embeddings whose outputs shall require grad."""


def make_plan(model: nn.Module, config: AdapterConfig, found: Survey | None = None) -> Plan:
    """Choose the layers that a config names in a model, and group them. The model is only read.

    Args:
        model: any module that holds linear layers.
        config: a config of any method.
        found: a survey of the model, with the layers to choose from; by default of all layers.

    Returns:
        The changes that ``patch_model`` would make.

    Raises:
        TypeError, ValueError: an argument names nothing, or something impossible.

    Example:
        >>> config = rasa_ext.RasaConfig(target_modules=["q_proj", "v_proj"])
        >>> plan = rasa_ext.patching.make_plan(model, config)
        >>> [group.pattern for group in plan.groups]
        ['model.layers.*.self_attn.q_proj', 'model.layers.*.self_attn.v_proj']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    found = found or survey(model)
    if "" in found.linears:
        raise ValueError(
            "model: expected a module that holds linear layers, got a linear layer itself, which "
            "cannot be replaced in place; wrap it, for example in torch.nn.Sequential."
        )
    stacked = found.stacks if config.grouping_of_experts else {}
    if config.grouping_of_experts and not stacked:
        others = ", ".join(list(found.expert_weights)[:3])
        others = f"; its expert and router weights are {others}" if others else ""
        raise ValueError(
            "experts: expected a model with stacked experts in a layout that transformers 5 marks, "
            f"found none{others}; leave out experts."
        )
    saved = _modules_to_save(found, config.modules_to_save)
    bases: dict[str, Base] = {**found.linears, **stacked}
    chosen, skipped = _choose(found, config, bases, saved)
    adapted = {name: bases[name] for name in chosen}
    for name, base in adapted.items():
        check_base(name, base)
    if stacked and not stacked.keys() & adapted.keys():
        first = next(iter(stacked))
        raise ValueError(
            f"experts: expected stacked weights to adapt, but all are left out, for example "
            f"{first!r}: {skipped[first]}; adapt at least one, or leave out experts."
        )
    tokens = find_rows(found, config)
    check_not_adapted(tokens, chosen)
    groups = group_layers(config, adapted)
    trained = tuple(f"{name}." for name in saved)
    untouched = {
        name: shape
        for name, shape in found.expert_weights.items()
        if name not in adapted and name not in skipped and not name.startswith(trained)
    }
    adaptable = untouched.keys() & (found.adaptable if hasattr(config, "experts") else ())
    for name, shape in untouched.items():
        how = "the argument experts adapts them" if name in adaptable else "not a linear layer"
        skipped[name] = f"weights of shape {shape}: {how}"
    return Plan(
        config=resolve_groups(config, groups),
        groups=groups,
        skipped=skipped,
        untouched=untouched,
        adaptable=frozenset(adaptable),
        modules_to_save=saved,
        tokens=tokens,
        dense_head=found.dense_head,
        inputs=found.inputs,
    )


def check_base(name: str, base: Base) -> None:
    """Raise TypeError or ValueError, naming the option, if a base layer cannot be adapted."""
    linear = isinstance(base, LinearBase)
    way_out = "leave it out with exclude_modules" if linear else "leave out experts"
    try:
        base.check(name)
    except (TypeError, ValueError) as error:
        option = "target_modules" if linear else "experts"
        raise type(error)(f"{option}: {error}, or {way_out}.") from None


def _choose(
    survey: Survey, config: AdapterConfig, names: Collection[str], saved: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """Choose the layers to adapt among ``names``; return them, and the others with the reason."""
    explicit = config.target_modules != ALL_LINEAR
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for name in _matched(survey, names, config.target_modules):
        within = next((s for s in saved if name == s or name.startswith(f"{s}.")), None)
        if matches(name, config.exclude_modules):
            skipped[name] = EXCLUDED
        elif explicit and within is not None:
            raise ValueError(
                f"modules_to_save: {within!r} is trained in full, but target_modules also adapts "
                f"{name!r} in it; name it in one of the two, or in exclude_modules."
            )
        elif within is not None:
            skipped[name] = "trained in full, named by modules_to_save"
        elif explicit and name in survey.refused:
            raise ValueError(
                f"target_modules: cannot adapt {name!r}: {survey.refused[name]}; {INSTEAD}."
            )
        elif name in survey.refused:
            skipped[name] = survey.refused[name]
        elif not explicit and name in survey.left_out:
            skipped[name] = survey.left_out[name]
        else:
            chosen.append(name)
    if not chosen:
        why = "".join(f" {name}: {reason}." for name, reason in list(skipped.items())[:5])
        if explicit and isinstance(config.target_modules, str):
            why += " A string other than 'all-linear' is a regular expression for whole names; pass"
            why += " names in a list."
        raise ValueError(
            f"target_modules: expected at least one linear layer, but {config.target_modules!r} "
            f"leaves none of the model's {len(survey.linears)}.{why}{_others(survey, config)}"
        )
    taken = set(chosen)
    for name in names:
        if name not in taken:
            skipped.setdefault(name, "not named by target_modules")
    for name, module in survey.modules.items() if explicit else ():
        if name and name not in names and matches(name, config.target_modules):
            excluded = matches(name, config.exclude_modules)
            skipped[name] = EXCLUDED if excluded else f"a {type(module).__name__}, {NOT_LINEAR}"
    for name in survey.pointwise_convolutions:
        if not any(name == s or name.startswith(f"{s}.") for s in saved):
            skipped[name] = "a 1x1 convolution, not a linear layer"
    return chosen, skipped


def resolve_config(
    model: nn.Module, config: AdapterConfig, found: Survey | None = None
) -> AdapterConfig:
    """Drop names from the lists of ``config`` that match no module of ``model``.

    For configs from files: PEFT accepts lists that name layers of several kinds of models.
    ``modules_to_save`` and ``trainable_token_indices`` get whole names. ``found`` is a survey of
    the model, if one was made.
    """
    found = found or survey(model)
    modules = [*(name for name in found.modules if name), *found.stacks]
    targets = config.target_modules
    if not isinstance(targets, str):
        known = (item for item in targets if any(matches(name, (item,)) for name in modules))
        targets = tuple(known) or targets
    saved = _with_ties(found, [n for n in modules if matches(n, config.modules_to_save)])
    groups = config.layer_groups
    if not callable(groups):
        known_items = (
            (label, tuple(item for item in items if any(ends_in(name, item) for name in modules)))
            for label, items in groups
        )
        groups = tuple((label, items) for label, items in known_items if items)
    return dataclasses.replace(
        config,
        target_modules=targets,
        modules_to_save=saved,
        trainable_token_indices=tuple(
            (rows.names[0], rows.ids) for rows in find_rows(found, config)
        ),
        groups=groups,
    )


def matches(name: str, names: Names) -> bool:
    """Return whether a name matches a regular expression in full, or ends in a suffix."""
    if isinstance(names, str):
        return matches_whole(names, name)
    return any(name == item or name.endswith(f".{item}") for item in names)


def _others(survey: Survey, config: AdapterConfig) -> str:
    """Return a clause for errors: matched modules with weights that are not linear layers."""
    targets = config.target_modules
    meant = {
        name: type(module).__name__
        for name, module in survey.modules.items()
        if not is_linear(module)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
        and (targets == ALL_LINEAR or matches(name, targets))
    }
    shown = ", ".join(f"{name} ({kind})" for name, kind in list(meant.items())[:5])
    more = ", ..." if len(meant) > 5 else ""
    way_out = ": not linear layers; modules_to_save trains such modules in full."
    return f" {shown}{more}{way_out}" if meant else ""


def _matched(survey: Survey, names: Collection[str], targets: Names) -> list[str]:
    """Return the names that ``target_modules`` matches."""
    if targets == ALL_LINEAR:
        return list(names)
    for item in () if isinstance(targets, str) else targets:
        if any(matches(name, (item,)) for name in names):
            continue
        if any(matches(name, (item,)) for name in survey.stacks):
            raise ValueError(
                f"target_modules: {item!r} names stacked expert weights, which are adapted "
                "with the argument experts, such as experts='shared'."
            )
        for name, module in survey.modules.items():
            if matches(name, (item,)):
                raise ValueError(
                    f"target_modules: expected names of linear layers, but {name!r} is a "
                    f"{type(module).__name__}; name layers in it, or name it in modules_to_save."
                )
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"target_modules: expected names of linear layers, but no linear layer's name "
            f"ends in {item!r}; the names end in {', '.join(known[:20]) or 'nothing'}."
        )
    return [name for name in names if matches(name, targets)]


def _modules_to_save(survey: Survey, names: Collection[str]) -> tuple[str, ...]:
    saved: dict[str, None] = {}
    for item in names:
        meant = [name for name in survey.modules if name and matches(name, (item,))]
        if not meant:
            raise ValueError(
                f"modules_to_save: expected suffixes of module names, but no name ends in {item!r}."
            )
        saved.update(dict.fromkeys(meant))
    return _with_ties(survey, saved)


def _with_ties(survey: Survey, saved: Collection[str]) -> tuple[str, ...]:
    """Add the modules that share a weight with ``saved`` ones, which training changes as well.

    PEFT copies the modules that a file names, which unties them from the others.
    """
    chosen = {name: module for name, module in survey.modules.items() if name in saved}
    weights = {parameter for module in chosen.values() for parameter in module.parameters()}
    inside = tuple(f"{name}." for name in saved)
    for name, module in survey.modules.items():
        shares = not weights.isdisjoint(module.parameters(recurse=False))
        if name and shares and not f"{name}.".startswith(inside):
            chosen[name] = module
    return tuple(name for name in survey.modules if name in chosen)


def suffixes(names: list[str], model: nn.Module) -> list[str]:
    """Return the shortest name suffixes that match these layers and no other module."""
    adapted = set(names)
    others = {
        name.replace(".base_layer", "")
        for name, _ in model.named_modules()
        if name and not _inside(name, adapted)
    }
    return shortest_suffixes(names, others)


def shortest_suffixes(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Return the shortest suffixes, at dots, of ``names`` that none of ``others`` ends in."""
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
