"""Warnings about valid settings that are probably a mistake, given before training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from rasa_ext.methods.base import AdapterConfig
from rasa_ext.methods.lora import LoraConfig
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.patching.grouping import Group, every_index, groups_of
from rasa_ext.patching.targets import EXCLUDED, NOT_LINEAR, Plan, matches

_MUCH = 0.1
"""Smallest part of a model's parameters, left untouched, that is worth a warning."""


def plan_warnings(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Yield one sentence per doubtful setting of a patched model: the problem, and what to do."""
    yield from _unused_exclusions(plan)
    yield from not_linear([n for n, why in plan.skipped.items() if why.endswith(NOT_LINEAR)])
    yield from _untouched(model, plan)
    yield from config_warnings(plan.config, plan.groups)


def config_warnings(
    config: AdapterConfig, groups: Sequence[Group], rank: str = "rank", prefix: str = ""
) -> Iterator[str]:
    """Yield one sentence per doubtful setting of the config and the groups.

    Args:
        config: the config.
        groups: groups of the adapted layers.
        rank: name of the argument that set the rank.
        prefix: put before the names ``k`` and ``groups``.
    """
    if isinstance(config, RasaConfig):
        yield from _rank_above_sides(config, groups, rank)
        yield from _little_shared(config, groups, prefix)


def _little_shared(config: RasaConfig, groups: Sequence[Group], prefix: str) -> Iterator[str]:
    """Yield a warning if most linear layers share no pool: RaSA is then close to a LoRA."""
    groups = [group for group in groups if not group.experts]
    total = sum(len(group.names) for group in groups)
    alone = _unshared(groups)
    if not config.k or 2 * alone <= total:
        return
    if total == 1:
        what = f"{groups[0].names[0]!r} is the only adapted layer and shares no pool"
    else:
        what = f"{alone} of {total} adapted layers share their pool with no other layer"
    shapes = {name: group.shape for group in groups for name in group.names}
    ends = list(dict.fromkeys(every_index(name).rpartition("*.")[2] for name in shapes))
    chosen = tuple((end, (end,)) for end in ends)
    better = groups_of(shapes, groups=chosen)
    way_out = f"pass {prefix}k=0 if this is intended"
    if _unshared(better) < alone:
        shared = dict.fromkeys(group.pattern for group in better if len(group.names) > 1)
        shown = ", ".join(repr(end) for end in list(shared)[:4])
        way_out = (
            "only the first integer that varies counts as the layer's index. To let layers "
            f"of one shape share a pool if their names end alike, pass {prefix}groups=[{shown}"
            f"{', ...' if len(shared) > 4 else ''}]"
        )
    close = f"the adapter is close to a LoRA of rank {config.rank}"
    yield f"{prefix}groups: {what}, so {close}; {way_out}."


def _unshared(groups: Sequence[Group]) -> int:
    return sum(len(group.names) == 1 for group in groups)


def _rank_above_sides(config: RasaConfig, groups: Sequence[Group], argument: str) -> Iterator[str]:
    """Yield a warning if the rank exceeds a layer's smaller side: extra ranks train nothing."""
    small = [group for group in groups if min(group.shape) < config.rank]
    if small:
        count = sum(len(group.names) for group in small)
        name, (out, width) = small[0].names[0], small[0].shape
        yield (
            f"{argument}: {config.rank} is above the smaller side of {name!r}, (out, in) ({out}, "
            f"{width}){f', and of {count - 1} more' if count > 1 else ''}; a change of this "
            f"weight has rank {min(out, width)} at most. Use a smaller rank, leave such layers out "
            "with exclude_modules, or train them in full with modules_to_save."
        )


def not_linear(names: Sequence[str]) -> Iterator[str]:
    """Yield a warning if target_modules also names modules that are no linear layers."""
    if names:
        more = f", as are {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"target_modules: {names[0]!r} is not a linear layer, and is left as it is{more}; name "
            "it in exclude_modules if this is intended."
        )


def _unused_exclusions(plan: Plan) -> Iterator[str]:
    """Yield a warning for each name in ``exclude_modules`` that leaves out no layer."""
    given = plan.config.exclude_modules
    excluded = [name for name, why in plan.skipped.items() if why == EXCLUDED]
    for item in (given,) if isinstance(given, str) else given:
        wanted = item if isinstance(given, str) else (item,)
        if not any(matches(name, wanted) for name in excluded):
            yield f"exclude_modules: {item!r} leaves out no layer that target_modules names."


def _untouched(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Yield a warning if untouched experts, which nobody excluded, are much of the model."""
    sizes = {name: math.prod(shape) for name, shape in plan.untouched.items()}
    share = sum(sizes.values()) / sum(parameter.numel() for parameter in model.parameters())
    if share < _MUCH:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])
    shown = ", ".join(f"{name} {plan.untouched[name]}" for name in largest[:3])
    ways = "'own'" if isinstance(plan.config, LoraConfig) else "'shared', 'slot' or 'layer'"
    how = f" To adapt them, pass experts={ways}." if plan.adaptable else ""
    yield (
        f"{len(sizes)} weights of experts, {100 * share:.0f} % of the model's parameters, stay "
        f"untouched, for example {shown}.{how}"
    )
