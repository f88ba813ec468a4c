"""Choices that work and are likely not what was meant, found before training begins."""

from __future__ import annotations

from collections.abc import Iterator

from rasa_ext.methods.base import AdapterConfig
from rasa_ext.methods.rasa import RasaConfig
from rasa_ext.patching.targets import Plan


def advice(config: AdapterConfig, plan: Plan) -> Iterator[str]:
    """Give a sentence for each choice to think about: what is off, and what to do."""
    if isinstance(config, RasaConfig):
        yield from _rank_above_sides(config, plan)


def _rank_above_sides(config: RasaConfig, plan: Plan) -> Iterator[str]:
    """A layer's change has no more ranks than its smaller side; what is above trains nothing."""
    small = [group for group in plan.groups if min(group.shape) < config.rank]
    if small:
        count = sum(len(group.names) for group in small)
        name, (out, width) = small[0].names[0], small[0].shape
        yield (
            f"rank: {config.rank} is above the smaller side of {name!r}, (out, in) ({out}, "
            f"{width}){f' and {count - 1} more layers' if count > 1 else ''}, whose change has at "
            f"most {min(out, width)} ranks; take a smaller rank, leave such layers out with "
            "exclude_modules, or train them in full with modules_to_save."
        )
