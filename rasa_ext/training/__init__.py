"""What some methods do between the steps of an optimizer."""

from __future__ import annotations

from rasa_ext.training.diagonals import diagonals, load_diagonals, train_diagonals
from rasa_ext.training.gates import ProximalGates, balance, prune, threshold_schedule
from rasa_ext.training.parameter_groups import parameter_groups
from rasa_ext.training.steps import adapter_of, replace_tensors

__all__ = [
    "ProximalGates",
    "adapter_of",
    "balance",
    "diagonals",
    "load_diagonals",
    "parameter_groups",
    "prune",
    "replace_tensors",
    "threshold_schedule",
    "train_diagonals",
]
