"""The files that a fine-tuning run leaves in its output directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from rasa_ext import save_adapter
from rasa_ext.train.callbacks import MetricsCallback
from rasa_ext.train.memory import peak_memory
from rasa_ext.train.options import RECORD, FinetuneOptions
from rasa_ext.train.plots import plot_loss
from rasa_ext.train.trainer import checkpoints_in


@dataclasses.dataclass
class FinetuneResult:
    """The outcome of a run; also in `summary.json` of the output directory."""

    output: str
    interrupted: bool
    step: int
    total_steps: int
    seconds: float
    """Time in training steps, of this process; evaluation and loading left out."""
    tokens_per_s: float | None
    first_loss: float | None
    last_loss: float | None
    """Mean over the last tenth of the steps."""
    eval_loss: float | None
    trainable: int
    peak_memory: dict[str, int]
    checkpoint: str | None = None
    """The newest checkpoint."""


def write_record(options: FinetuneOptions) -> None:
    """Write the run's options as a file that `--config` takes."""
    text = yaml.safe_dump(options.to_dict(), sort_keys=False)
    (Path(options.output) / RECORD).write_text(text, encoding="utf-8")


def write_results(
    model: Any,
    tokenizer: Any,
    options: FinetuneOptions,
    step: int,
    total: int,
    interrupted: bool,
    metrics: MetricsCallback,
    trainable: int,
) -> FinetuneResult:
    """Write adapter, tokenizer, `loss.png`, `summary.json` and `finetune.yaml` into the output."""
    output = Path(options.output)
    write_record(options)
    losses = [row["loss"] for row in metrics.rows if "loss" in row]
    held_out = [row["eval_loss"] for row in metrics.rows if "eval_loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    saved = checkpoints_in(output)
    result = FinetuneResult(
        output=options.output,
        interrupted=interrupted,
        step=step,
        total_steps=total,
        seconds=metrics.seconds,
        tokens_per_s=metrics.tokens / metrics.seconds if metrics.seconds else None,
        first_loss=losses[0] if losses else None,
        last_loss=sum(tail) / len(tail) if tail else None,
        eval_loss=held_out[-1] if held_out else None,
        trainable=trainable,
        peak_memory=peak_memory(),
        checkpoint=str(saved[-1][1]) if saved else None,
    )
    save_adapter(model.eval(), output)
    tokenizer.save_pretrained(output)
    if losses:
        plot_loss(
            metrics.rows, output / "loss.png", f"RaSA r={options.rank}, {Path(options.model).name}"
        )
    text = json.dumps(dataclasses.asdict(result), indent=2)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    return result
