"""Trainer callbacks: lines of progress, and an interrupt that can be resumed."""

from __future__ import annotations

import datetime
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback

_SILENCE = 5.0  # least seconds between progress lines


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite."""


class Progress(TrainerCallback):
    """Print evaluations, the first and last step, and a step every few seconds.

    Args:
        console: prints the lines.
        names: other numbers of Trainer's log to print, by name, with what to call them.
    """

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        self.console, self.names = console, names
        self._shown = -math.inf
        self.seconds, self.tokens = 0.0, 0
        """Of this part of the run."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._began, self._first = time.perf_counter(), state.global_step
        self._seen = state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._began
        self.tokens = state.num_input_tokens_seen - self._seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print Trainer's log; end a run whose loss is no number."""
        logs, step, steps = logs or {}, state.global_step, state.max_steps
        if not math.isfinite(loss := logs.get("loss", 0.0)):
            raise TrainingDiverged(
                f"lr: the loss became {loss} at step {step}; lower --lr (now "
                f"{args.learning_rate:g}) or use --dtype float32."
            )
        if "eval_loss" in logs:
            more = self._more(logs, "eval_")
            self.console.print(f"step {step}: held-out loss {logs['eval_loss']:.4f}{more}")
        elif "loss" in logs:
            now = time.perf_counter()
            if step == steps or now - self._shown >= _SILENCE:
                self._shown = now
                passed, done = self.seconds, max(step - self._first, 1)
                elapsed, left = (
                    datetime.timedelta(seconds=round(duration))
                    for duration in (passed, passed / done * (steps - step))
                )
                speed = f"{self.tokens / passed:,.0f} tokens/s  " if self.tokens else ""
                self.console.print(
                    f"step {step}/{steps}  loss {loss:.4f}{self._more(logs)}  "
                    f"lr {logs['learning_rate']:.2e}  {speed}{elapsed} elapsed, {left} left"
                )

    def _more(self, logs: Mapping[str, float], prefix: str = "") -> str:
        found = ((text, logs.get(prefix + name)) for name, text in self.names.items())
        return "".join(f"  {text} {value:.4f}" for text, value in found if value is not None)


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
