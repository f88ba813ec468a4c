"""Trainer callbacks: progress lines, metrics.jsonl, and a stop that can be resumed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

_SILENCE = 5.0
"""Seconds after which a line is due, where there is no live one."""


class TrainingDiverged(ValueError):
    """The loss is no longer a number."""


class MetricsCallback(TrainerCallback):
    """Appends a JSON object to metrics.jsonl for every step and every evaluation.

    A step has `step`, `epoch`, `loss`, `lr`, `grad_norm`, `tokens` (without padding), `seconds`
    (of the step alone: neither evaluations nor saving) and `tokens_per_s`; an evaluation has
    `step` and `eval_loss`. On a resume, lines after the checkpoint's step are dropped first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._began = 0.0
        self._seen = 0

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of steps, those before a resume too."""
        return [row for row in self.rows if "loss" in row]

    @property
    def held_out(self) -> list[float]:
        """The held-out losses, in order."""
        return [row["eval_loss"] for row in self.rows if "eval_loss" in row]

    @property
    def seconds(self) -> float:
        """Time in steps, of all runs."""
        return sum(row.get("seconds", 0.0) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens without padding, of all runs."""
        return sum(row.get("tokens", 0) for row in self.rows)

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep what an earlier part of this run wrote up to here."""
        if state.global_step and self.path.is_file():
            self.rows = [r for r in read_metrics(self.path) if r["step"] <= state.global_step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        self.path.write_text(text, encoding="utf-8")
        self._seen = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the step's clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the step's clock."""
        self._step_seconds = time.perf_counter() - self._began
        self._step_tokens = state.num_input_tokens_seen - self._seen
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
                "tokens": self._step_tokens,
                "seconds": self._step_seconds,
                "tokens_per_s": self._step_tokens / max(self._step_seconds, 1e-9),
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


class EvaluationProgress(TrainerCallback):
    """Counts the batches of an evaluation, in a line whenever the last is a few seconds old."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._batches = 0
        self._last = time.perf_counter()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Count a batch."""
        self._batches += 1
        self._show(f"held-out loss: batch {self._batches} of {len(eval_dataloader)}")

    def _show(self, text: str) -> None:
        if time.perf_counter() - self._last >= _SILENCE:
            self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text)
        self._last = time.perf_counter()


class ProgressCallback(EvaluationProgress):
    """A live line on a terminal; elsewhere a line whenever the last is a few seconds old."""

    def __init__(self, console: Console, metrics: MetricsCallback, examples: int | None) -> None:
        super().__init__(console)
        self.metrics = metrics
        self.examples = examples
        """How many are held out, if any."""
        self._bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the line."""
        self._first = state.global_step
        if args.eval_on_start:
            self._announce(state)
        if not self.console.is_terminal:
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
        self._task = self._bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, text=""
        )
        self._bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest row of the metrics, which come first in the list of callbacks."""
        row = self.metrics.rows[-1] if self.metrics.rows else {}
        step = state.global_step
        if "eval_loss" in (logs or {}):
            self._batches = 0
            self._print(f"step {step}: held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in (logs or {}):
            text = (
                f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s  "
                f"{_clock(self.metrics.seconds)} elapsed, {_clock(self._remaining(state))} left"
            )
            if self._bar is not None:
                self._bar.update(self._task, completed=step, text=text)
            elif step in (self._first + 1, state.max_steps):
                self._print(f"step {step}/{state.max_steps}  {text}")
            else:
                self._show(f"step {step}/{state.max_steps}  {text}")
            if control.should_evaluate:
                self._announce(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the line."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call more than once."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _announce(self, state: Any) -> None:
        self._batches = 0
        self._print(
            f"step {state.global_step}: measuring the held-out loss on {self.examples:,} examples"
        )

    def _remaining(self, state: Any) -> float:
        """By the mean pace of this process's steps."""
        steps = [row["seconds"] for row in self.metrics.steps if row["step"] > self._first]
        return sum(steps) / len(steps) * (state.max_steps - state.global_step)

    def _show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        else:
            super()._show(text)


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
        """Save and stop at a step's end."""
        return self._stop(control)

    def on_evaluate(self, args, state, control, **kwargs):
        """Save and stop after an evaluation, which lies between two steps."""
        return self._stop(control)

    def _stop(self, control: Any) -> Any:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control


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
