"""What methods do between the steps of an optimizer."""

from rasa_research.training.boosting import Boosting
from rasa_research.training.calibration import calibrate
from rasa_research.training.continual import absorb, next_task

__all__ = ["Boosting", "absorb", "calibrate", "next_task"]
