"""Trainer callbacks: metrics.jsonl and progress lines, and an interrupt that can be resumed."""

from __future__ import annotations

import datetime
import json
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback

_SILENCE = 5.0  # least seconds between progress lines


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite."""


class MetricsCallback(TrainerCallback):
    """Append one JSON row per step and per evaluation to metrics.jsonl, and print some of them.

    A step has `step`, `epoch`, `loss`, `lr`, `grad_norm`, `tokens` (without padding), `seconds`
    (without evaluations and saving) and `tokens_per_s`. An evaluation has `step`, `epoch` and
    `eval_loss`. The rows replace Trainer's own in `state.log_history`. Checkpoints store that
    history, so a resumed run starts with the rows up to its checkpoint.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.console = console
        self._began, self._shown = 0.0, -math.inf
        self._seen = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the rows of the run's earlier part, if it is resumed."""
        if state.is_world_process_zero:
            text = "".join(json.dumps(row) + "\n" for row in state.log_history)
            self.path.write_text(text, encoding="utf-8")
        self._seen = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the step's clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the step's clock."""
        self._seconds = time.perf_counter() - self._began
        self._tokens = state.num_input_tokens_seen - self._seen
        self._seen = state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write Trainer's log as a row with our names."""
        logs = logs or {}
        row: dict[str, Any] = {"step": state.global_step, "epoch": logs.get("epoch")}
        if "loss" in logs:
            row |= {
                "loss": logs["loss"],
                "lr": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "tokens": self._tokens,
                "seconds": self._seconds,
                "tokens_per_s": self._tokens / max(self._seconds, 1e-9),
            }
        elif "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
        else:
            return
        if not math.isfinite(row.get("loss", 0.0)):
            raise TrainingDiverged(
                f"lr: the loss became {row['loss']} at step {state.global_step}; lower --lr "
                f"(now {args.learning_rate:g}) or use --dtype float32."
            )
        state.log_history[-1] = row
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._show(row, state)

    def _show(self, row: dict[str, Any], state: Any) -> None:
        """Print an evaluation, the first and last step, and a step every few seconds."""
        step, steps = row["step"], state.max_steps
        if "eval_loss" in row:
            self.console.print(f"step {step}: held-out loss {row['eval_loss']:.4f}")
            return
        now = time.perf_counter()
        if step == steps or now - self._shown >= _SILENCE:
            self._shown = now
            seconds = sum(values(state.log_history, "seconds"))
            elapsed, left = (
                datetime.timedelta(seconds=round(duration))
                for duration in (seconds, seconds / step * (steps - step))
            )
            self.console.print(
                f"step {step}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  {elapsed} elapsed, {left} left"
            )


class InterruptCallback(TrainerCallback):
    """On Ctrl-C, save a checkpoint after the step and stop; on a second Ctrl-C, stop at once.

    Several processes stop after the same step, or else each would wait for the others.
    Use it as a context manager around `Trainer.train`; it restores the previous handler.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested = self._pressed = False
        self._previous: Any = None

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: Any) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self.requested = self._pressed = True
        self.console.print(
            "Stopping after this step, with a checkpoint; press Ctrl-C again to stop without one."
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop, after a step or after the evaluation that follows it."""
        if args.world_size > 1:
            pressed = torch.tensor(float(self._pressed), device=args.device)
            dist.all_reduce(pressed)
            self.requested = pressed.item() > 0
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    on_evaluate = on_step_end


def values(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return the values of one metric in order, from the rows that have it."""
    return [row[name] for row in rows if name in row]
