"""What the tests over trainers share."""

from __future__ import annotations

QUIET = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments of short trainings on a CPU, of which the log alone is looked at."""
