"""A model in place: finding its layers, swapping them, merging, taking the patch off again."""

from rasa_ext.patching.grouping import Group
from rasa_ext.patching.targets import Plan, make_plan

__all__ = ["Group", "Plan", "make_plan"]
