"""The outcome of a fine-tuning run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class FinetuneResult:
    """The outcome of a run; also in `summary.json` of the output directory."""

    output: str
    interrupted: bool
    step: int
    total_steps: int
    seconds: float
    """Time in training steps, of all runs of a resumed training, without evaluation and loading."""
    tokens_per_s: float | None
    first_loss: float | None
    """Mean over the first tenth of the steps."""
    last_loss: float | None
    """Mean over the last tenth of the steps."""
    eval_loss_before: float | None
    eval_loss: float | None
    """Held out, of the last evaluation."""
    trainable: int
    peak_memory: dict[str, int]
    checkpoint: str | None = None
    """The newest checkpoint."""
