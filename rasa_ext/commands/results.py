"""The files that a fine-tuning run leaves in its output directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from rasa_ext.commands.callbacks import MetricsCallback
from rasa_ext.commands.card import run_card
from rasa_ext.commands.checkpoints import checkpoints_in
from rasa_ext.commands.memory import peak_memory
from rasa_ext.commands.options import RECORD, FinetuneOptions
from rasa_ext.commands.outcome import FinetuneResult
from rasa_ext.commands.plots import plot_loss
from rasa_ext.commands.trainer import AdapterTrainer
from rasa_ext.methods import method_named


def write_record(options: FinetuneOptions) -> None:
    """Write the run's options as a file that `--config` takes."""
    text = yaml.safe_dump(options.to_dict(), sort_keys=False)
    (Path(options.output) / RECORD).write_text(text, encoding="utf-8")


def write_results(
    trainer: AdapterTrainer,
    options: FinetuneOptions,
    step: int,
    total: int,
    interrupted: bool,
    metrics: MetricsCallback,
    trainable: int,
) -> FinetuneResult:
    """Write adapter, card, tokenizer, `loss.png` and `summary.json` into the output."""
    output = Path(options.output)
    losses = [row["loss"] for row in metrics.steps]
    held_out = metrics.held_out
    saved = checkpoints_in(output)
    result = FinetuneResult(
        output=options.output,
        interrupted=interrupted,
        step=step,
        total_steps=total,
        seconds=metrics.seconds,
        tokens_per_s=metrics.tokens / metrics.seconds if metrics.seconds else None,
        first_loss=_mean(losses[: _tenth(losses)]),
        last_loss=_mean(losses[-_tenth(losses) :]),
        eval_loss_before=held_out[0] if held_out else None,
        eval_loss=held_out[-1] if held_out else None,
        trainable=trainable,
        peak_memory=peak_memory(),
        checkpoint=str(saved[-1][1]) if saved else None,
    )
    trainer.model.eval()
    trainer.card = run_card(trainer, options, result)
    trainer.save_model()
    if losses:
        title = f"{method_named(options.method).title} r={options.rank}, {Path(options.model).name}"
        plot_loss(metrics.rows, output / "loss.png", title)
    text = json.dumps(dataclasses.asdict(result), indent=2)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    return result


def _tenth(losses: list[Any]) -> int:
    return max(1, len(losses) // 10)


def _mean(losses: list[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None
