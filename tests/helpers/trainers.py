"""Arguments for tests with a Trainer."""

from __future__ import annotations

QUIET = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments for short trainings on a CPU, of which tests read only the log."""
