"""Training procedures of methods, which run between optimizer steps or between tasks."""

from rasa_research.methods.gated_rasa import ProximalGates, balance, prune, threshold_schedule
from rasa_research.training.boosting import Boosting
from rasa_research.training.calibration import calibrate
from rasa_research.training.continual import absorb, next_task
from rasa_research.training.diagonals import diagonals, load_diagonals, train_diagonals

__all__ = [
    "Boosting",
    "ProximalGates",
    "absorb",
    "balance",
    "calibrate",
    "diagonals",
    "load_diagonals",
    "next_task",
    "prune",
    "threshold_schedule",
    "train_diagonals",
]
