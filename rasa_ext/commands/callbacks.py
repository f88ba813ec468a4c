"""Trainer callbacks: metrics.jsonl and progress lines, and a stop that can be resumed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

_SILENCE = 5.0  # seconds after which a line is due


class TrainingDiverged(ValueError):
    """The loss is no longer a number."""


class MetricsCallback(TrainerCallback):
    """Appends a JSON object to metrics.jsonl for every step and every evaluation, and shows some.

    A step has `step`, `epoch`, `loss`, `lr`, `grad_norm`, `tokens` (without padding), `seconds`
    (of the step alone: neither evaluations nor saving) and `tokens_per_s`; an evaluation has
    `step` and `eval_loss`. On a resume, lines after the checkpoint's step are dropped first.
    """

    def __init__(self, path: Path, console: Console, held_out: int = 0) -> None:
        self.path = path
        self.console = console
        self.held_out = held_out  # how many examples
        self.rows: list[dict[str, Any]] = []
        self._began = self._shown = 0.0
        self._seen = self._first = 0

    def values(self, name: str) -> list[Any]:
        """Those of one figure, in order, from before a resume too."""
        return [row[name] for row in self.rows if name in row]

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep what an earlier part of this run wrote up to here."""
        if state.global_step and self.path.is_file():
            self.rows = [r for r in read_metrics(self.path) if r["step"] <= state.global_step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        self.path.write_text(text, encoding="utf-8")
        self._seen, self._first = state.num_input_tokens_seen, state.global_step
        if args.eval_on_start:
            self._announce(0)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the step's clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the step's clock."""
        self._seconds = time.perf_counter() - self._began
        self._tokens = state.num_input_tokens_seen - self._seen
        self._seen = state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write what Trainer logged under our names."""
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
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row, state, control)

    def _show(self, row: dict[str, Any], state: Any, control: Any) -> None:
        """Print an evaluation, and a step if it is the first, the last, or a line is due."""
        step, steps = row["step"], state.max_steps
        if "eval_loss" in row:
            self.console.print(f"step {step}: held-out loss {row['eval_loss']:.4f}")
            return
        now = time.perf_counter()
        if step in (self._first + 1, steps) or now - self._shown >= _SILENCE:
            self._shown = now
            seconds = self.values("seconds")
            here = seconds[self._first - step :]  # of this process
            left = sum(here) / len(here) * (steps - step)
            self.console.print(
                f"step {step}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  {_clock(sum(seconds))} elapsed, "
                f"{_clock(left)} left"
            )
        if control.should_evaluate:
            self._announce(step)

    def _announce(self, step: int) -> None:
        self.console.print(
            f"step {step}: measuring the held-out loss on {self.held_out:,} examples"
        )


class InterruptCallback(TrainerCallback):
    """Turns Ctrl-C into a checkpoint at the end of the step, and a second one into a plain stop.

    Use it as a context manager around `Trainer.train`; it restores the previous handler.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> InterruptCallback:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print("Stopping after this step, with a checkpoint; Ctrl-C again to drop it.")

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop at a step's end, or after the evaluation that follows it."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    on_evaluate = on_step_end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a line that a crash cut off is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _clock(seconds: float) -> str:
    """Such as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
