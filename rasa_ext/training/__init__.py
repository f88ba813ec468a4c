"""What some methods do between the steps of an optimizer."""

from __future__ import annotations

from rasa_ext.training.boosting import Boosting
from rasa_ext.training.calibration import calibrate
from rasa_ext.training.continual import absorb, next_task
from rasa_ext.training.diagonals import diagonals, load_diagonals, train_diagonals
from rasa_ext.training.gates import ProximalGates, balance, prune, threshold_schedule
from rasa_ext.training.parameter_groups import parameter_groups

__all__ = [
    "Boosting",
    "ProximalGates",
    "absorb",
    "balance",
    "calibrate",
    "diagonals",
    "load_diagonals",
    "next_task",
    "parameter_groups",
    "prune",
    "threshold_schedule",
    "train_diagonals",
]
