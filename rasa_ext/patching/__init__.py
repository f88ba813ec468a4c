"""Patching of a model in place: choosing layers, swapping them, merging, unpatching."""

from rasa_ext.patching.grouping import Group, pattern
from rasa_ext.patching.patch import check_unpatched, plan_layers
from rasa_ext.patching.state import check_unmerged, owners, unwrap
from rasa_ext.patching.targets import Plan, make_plan

__all__ = [
    "Group",
    "Plan",
    "check_unmerged",
    "check_unpatched",
    "make_plan",
    "owners",
    "pattern",
    "plan_layers",
    "unwrap",
]
